"""What was made last and may be wanted again: plans, layouts and lists, each for all layers, both passes and every step that is alike."""


class Recent:
    """Things by everything that they depend on, the last one asked for at the end. size(thing): what it takes of the room.

    Every layer of every segment asks, so what asking costs must not grow with how much is kept.
    """

    noted = None  # a list while somebody keeps all that is asked for (kernels/replayed.py)

    def __init__(self, room, size):
        self.room, self.size = room, size
        self.clear()

    def get(self, key, make):
        """The thing of this key, made by make() if it is not there; what nobody asked for longest goes where room is short."""
        there = self.made.pop(key, None)
        self.made[key] = thing = there or make()
        self.held += 0 if there else self.size(thing)
        if Recent.noted is not None:
            Recent.noted.append(thing)
        while len(self.made) > 1 and self.held > self.room:
            self.held -= self.size(self.made.pop(next(iter(self.made))))
        return thing

    def clear(self):
        self.made, self.held = {}, 0

    def __len__(self):
        return len(self.made)
