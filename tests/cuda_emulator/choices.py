"""`early`: what generated CUDA reads whether or not it is chosen.

TVM writes ``if_then_else`` as a statement before the expression that it is in. Within a ``Select`` it comes before the
choice, and so is computed whatever is chosen; but from what is chosen only under a condition TVM drops the bounds that
this condition implies, those of places in memory among them. Such reads go outside of tensors, most often to where
other data lies: guards of tensors see few of them.
"""

from __future__ import annotations

import re

__all__ = ["early"]


def early(text: str) -> list[str]:
    """Return the choices, as they are written in the text, of which a part is read from a tensor before."""
    read = set(re.findall(r"\b(condval\w*) = [^;]*\b[a-z]\w*_ptr\[", text))
    found = []
    for match in re.finditer(r" \? ", text):
        depth, end = 0, match.end()
        # To the parenthesis that closes the choice.
        while depth >= 0 and text[end] != ";":
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        if read.intersection(re.findall(r"\bcondval\w*", text[match.end() : end])):
            begin = text.rfind("\n", 0, match.start()) + 1
            found.append(text[begin:end].strip())
    return found
