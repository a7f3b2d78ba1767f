"""mkdocs hook: a page for every percent script in docs/tutorials.

`# %% [markdown]` cells become prose, `# %%` cells become Python blocks; the script itself is linked at the top.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; mkdocs then treats them like all others (links, navigation, search)."""
    for script in sorted(Path(config.docs_dir).glob("tutorials/*.py")):
        text = page(script.read_text(encoding="utf-8"), script.name)
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=text))
    return files


def page(source: str, name: str) -> str:
    """Markdown of a percent script called `name`."""
    parts = CELL.split(source)[1:]
    blocks = []
    for kind, cell in zip(parts[::2], parts[1::2], strict=True):
        if "[markdown]" in kind:
            blocks.append(re.sub(r"^# ?", "", cell.strip(), flags=re.MULTILINE))
        else:
            blocks.append(f"```python\n{cell.strip()}\n```")
    title, _, rest = blocks[0].partition("\n")
    run = f"*This page is a script, [{name}]({name}): `python docs/tutorials/{name}` runs it.*"
    return "\n\n".join([title, run, rest.strip(), *blocks[1:]]) + "\n"
