"""Kernels that are asked for again and again, asked for at once: a function over tensors that stay where they are, as one CUDA graph.

A host needs some ten microseconds to ask for a kernel, and a short segment's kernels do not take much longer: then the device waits for
the host. Without CUDA (Triton's interpreter) a replay runs the function again, into the same memory.
"""

import torch


class Replays:
    """What the replays of a model share: the rooms that all its layers work in, one after the other, and the memory of their graphs."""

    def __init__(self, rows):
        self.rows, self.warm, self.rooms, self.kept = rows, False, {}, set()
        self.stream = self.pool = None

    def serves(self, x):
        """Are these the rows that are replayed, and is all that they need compiled and loaded? The first pass goes kernel by kernel."""
        if len(x) != self.rows or not self.warm:
            return False
        if self.pool is None and x.is_cuda:
            # what the first pass worked in makes room for what is kept now
            torch.cuda.empty_cache()
            self.stream, self.pool = torch.cuda.Stream(x.device), torch.cuda.graph_pool_handle()
        return True

    def room(self, name, like, width, fill=None):
        """A tensor [rows, width] of this name, one for all layers."""
        key = name, width, like.dtype
        if key not in self.rooms:
            self.rooms[key] = like.new_empty(self.rows, width) if fill is None else like.new_full((self.rows, width), fill)
        return self.rooms[key]

    def stays(self, x):
        """x, if it is what a replay gives each time, else a copy that stays."""
        return x if x.data_ptr() in self.kept else x.clone()


class Replay:
    """f() -> a tuple of tensors and of tuples of them, run once now, and again at each call, with the results in the same places."""

    def __init__(self, f, shared):
        self.f, self.graph = f, None
        if shared.pool is None:
            self.out = f()
            return
        self.graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        shared.stream.wait_stream(current)
        with torch.cuda.stream(shared.stream):
            # other threads may ask for memory of the host meanwhile
            self.graph.capture_begin(pool=shared.pool, capture_error_mode="thread_local")
            try:
                self.out = f()
            finally:
                self.graph.capture_end()
        current.wait_stream(shared.stream)
        self.graph.replay()

    def __call__(self):
        if self.graph is None:
            for there, new in zip(leaves(self.out), leaves(self.f())):
                there.copy_(new)
        else:
            self.graph.replay()
        return self.out


def leaves(tree):
    return [tree] if torch.is_tensor(tree) else [x for part in tree for x in leaves(part)]
