"""`xscale new-method NAME`: a working method, its configuration, its test and its packaging, in a folder of yours."""

import argparse
import keyword
import os
import re
from importlib.resources import files
from pathlib import Path

from xscale_lightning.errors import UserError
from xscale_lightning.files import told
from xscale_lightning.places import beside

# kind -> the lines of its own options in the configuration; its template is method_KIND.py.txt
KINDS = {
    "denoising": "    noise: 0.5",
    "masked": "    mask_ratio: 0.75",
    "joint": "    dim: 256",
}
# template -> path inside the new folder; {name} is the method's name
FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "init.py.txt": "{name}/__init__.py",
    "method_{kind}.py.txt": "{name}/method.py",
    "config.yaml.txt": "configs/{name}.yaml",
    "test_method.py.txt": "tests/test_{name}.py",
    "README.md.txt": "README.md",
}


def write_project(name: str, parent: Path, kind: str = "denoising") -> Path:
    """Write the project `parent/name`, with a method of a kind of `KINDS`, whole or not at all.

    Raises:
        UserError: a name that Python cannot import, or a folder that exists or cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name == "xscale_lightning":
        raise UserError(f"NAME {name!r} is no module name: use lower-case letters, digits and _, such as my_method.")
    target = parent / name
    if target.exists():
        raise UserError(f"folder {str(target)!r} exists already: choose another NAME or --into another folder.")
    words = {"NAME": name, "CLASS": "".join(part.capitalize() for part in name.split("_")), "OPTIONS": KINDS[kind]}
    with told(target, "--into "):
        parent.mkdir(parents=True, exist_ok=True)
        with beside(target) as place:
            draft = place / "new"
            for template, path in FILES.items():
                source = files("xscale_lightning.commands") / "templates" / template.format(kind=kind)
                text = source.read_text(encoding="utf-8")
                for word, value in words.items():
                    text = text.replace(f"@{word}@", value)
                file = draft / path.format(name=name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            os.rename(draft, target)
    return target


def main(argv: list[str]) -> None:
    """Write the project and say what to do with it."""
    parser = argparse.ArgumentParser(prog="xscale new-method", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="name of the method, such as my_method")
    parser.add_argument("--kind", choices=tuple(KINDS), default="denoising",
        help="what to begin with: denoise pixels, predict features of masked patches, or join two views")  # fmt: skip
    parser.add_argument("--into", default=".", help="folder in which the new folder NAME is made")
    args = parser.parse_args(argv[1:])
    target = write_project(args.name, Path(args.into), args.kind)
    print(f"wrote {target}: the method is {args.name}/method.py. Next:")
    print(f"  cd {target} && pip install -e . && pytest")
    print(f"  xscale fit --config configs/{args.name}.yaml")
