"""The one error of this package."""


class WireError(Exception):
    """A message is not what the protocol allows; the text says which field, and why.

    Internal: whoever reads from a socket counts it, logs it and drops the message. It is not part
    of the public tree, because no caller can cause it.
    """
