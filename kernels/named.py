"""Rules by name."""
import torch
rules = {}
def named(rule):
    name = f"{rule} {rule.options}"
    rules[name] = rule
    return name
def rule_of(name):
    return rules[name]
