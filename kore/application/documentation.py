"""The table of options as a page to read: ``python -m kore.application.documentation > docs/options.md``.

It stands apart from the table so that a server that starts does not load it, and a test compares the page in docs/
with what this prints: documentation that is made from the code that checks the values can't be wrong about them.
"""

from __future__ import annotations

from kore.application.settings import OPTIONS


def options_markdown() -> str:
    """The documentation of all options, as Markdown: what docs/options.md holds."""
    lines = [
        "# Options",
        "",
        "An application sets them in `configure`, or anywhere at module level, before the server starts:",
        "",
        "```python",
        "kore.config.workers = 2",
        "kore.config.http_body_max = 4 * 1024 * 1024",
        "```",
        "",
        "Numbers may be given as text; `True` and `False` do for yes and no. An unknown name or a bad value is an",
        "error that says what is allowed, and the server does not start. After the start every assignment raises",
        "`RuntimeError`. Where the command line says the same thing, the command line wins.",
        "",
        "The option `file`, which this version does not have yet (see the README), is refused when the server starts.",
        "",
        "This page is printed by `python -m kore.application.documentation`.",
    ]
    part = ""
    for option in OPTIONS.values():
        if option.part != part:
            part = option.part
            lines += ["", f"## {part}", "", "| option | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        meaning = option.meaning + (" May be assigned several times." if option.repeatable else "")
        lines.append(f"| `{option.name}` | {option.default_text} | {option.kind.allowed} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(options_markdown(), end="")
