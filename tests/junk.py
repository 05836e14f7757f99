"""Replacing any value of plain data by junk: what the tests of damaged plans and files share."""

import copy


def places(value, path=()):
    """The path of every value in plain data."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def replaced(data, path, value):
    """A copy of plain data with the value at a path replaced."""
    if not path:
        return value
    data = copy.copy(data)
    data[path[0]] = replaced(data[path[0]], path[1:], value)
    return data
