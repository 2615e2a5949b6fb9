"""Full fine-tuning: every parameter trains."""

LR = 1e-4


def apply(model, o):
    pass


def trains(name, o):
    return True
