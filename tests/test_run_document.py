"""What runs the documents lets no command go unseen."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from .run_document import ROOT, blocks, check_command, commands, run

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_of_the_documentation_is_one(path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.language != "python":
            for words in commands(block):
                check_command(words)


UNSEEN = {
    "unknown command": "```sh\nvitexplain no-such-command\n```\n",
    "unknown option": "```sh\nvitexplain dataset photos/ --outptu maps.zarr\n```\n",
    "in a block that is only checked": "```bash\nvitexplain no-such-command\n```\n",
    "with a title": '```sh title="x"\nvitexplain no-such-command\n```\n',
    "between tildes": "~~~sh\nvitexplain no-such-command\n~~~\n",
    "indented": "- item\n\n    ```sh\n    vitexplain no-such-command\n    ```\n",
    "after another": "```sh\nvitexplain methods --json\nvitexplain no-such-command\n```\n",
    "another program": "```sh\ncurl example.org\n```\n",
    "another language": "```ruby\nputs 1\n```\n",
    "no such target": "```sh\nmake no-such-target\n```\n",
    "no such extra": "```sh\npip install '.[no-such-extra]'\n```\n",
    "no such program": "```sh\npython examples/no_such_example.py\n```\n",
}


@pytest.mark.parametrize("document", UNSEEN.values(), ids=UNSEEN.keys())
def test_a_command_that_is_none_is_found(document: str, tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text(document)
    with pytest.raises((SystemExit, Exception), match=r"no-such|no_such|outptu|curl|ruby|make"):
        run(path)


def test_a_block_that_ends_the_program_does_not_end_the_document(tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text("```python\nraise SystemExit\n```\n")
    with pytest.raises(RuntimeError, match=r"document.md, line 2: the block ends the program"):
        run(path)


def test_commands_are_split_as_a_shell_does() -> None:
    (block,) = blocks("```sh\nmake demo  # sets up\nvitexplain explain 'a b.jpg' \\\n  --json && make test\n```\n")
    assert [shlex.join(words) for words in commands(block)] == ["make demo", "vitexplain explain 'a b.jpg' --json", "make test"]
