"""Full fine-tuning: every parameter trains."""


def apply(model, o):
    pass


def trains(name, o):
    return True
