"""Kernel images compiled ahead of time."""


def installed() -> bool:
    return False


def find(variant, architecture):
    return None
