"""Renders packaging/man/*.in to manual pages: ``manual.py DIRECTORY``.

What a person wrote stays as it is; a line ``@NAME arguments@`` is replaced by what the code says: options, commands,
exit codes, keys of the configuration, counters, reasons. A page never repeats by hand what stands in a table.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterator

from command_lines import ROOT, Argument, Command, Program, programs

from mpserverd.arena.counters import COUNTERS
from mpserverd.arena.state import CloseReason, RefuseReason
from mpserverd.cli import ctl, load
from mpserverd.config.options import OPTIONS, SECTIONS, Option
from mpserverd.config.show import default_value_text, wants_text
from mpserverd.version import VERSION

TEMPLATES = ROOT / "packaging" / "man"
CHANGELOG = ROOT / "debian" / "changelog"
WIDTH = 78
EXIT_CODES = {"mpserverctl": ctl.EXIT_CODES, "mpload": load.EXIT_CODES}


def roff(text: str) -> str:
    """Plain text as roff: ``code`` in bold, and a minus where somebody may copy it."""
    text = text.replace("\\", "\\e")
    text = re.sub(r"(?<![A-Za-z0-9])-(?=[A-Za-z0-9-])|--", lambda found: found[0].replace("-", "\\-"), text)
    text = re.sub(r"`([^`]+)`", lambda found: f"\\fB{found[1]}\\fR", text)
    return "\\&" + text if text[:1] in (".", "'") else text


def sentence(text: str) -> str:
    text = text[:1].upper() + text[1:] if re.match(r"[a-z]+[ ,]", text) else text
    return text if re.search(r"[.:]( \(.*\))?$", text) else text + "."


def bold(text: str) -> str:
    return "\\fB" + text.replace("\\", "\\e").replace("-", "\\-") + "\\fR"


def italic(text: str) -> str:
    return "\\fI" + text.replace("\\", "\\e").replace("-", "\\-") + "\\fR"


def item(head: str, text: str) -> Iterator[str]:
    yield from (".TP", head, roff(text))


def argument_head(argument: Argument) -> str:
    value = f" {italic(argument.metavar)}" if argument.metavar else ""
    if not argument.names:
        return value.strip()
    return ", ".join(bold(name) for name in argument.names) + value


def synopsis(command: Command, common: set[str]) -> str:
    words = [bold(command.name)]
    for argument in command.options:
        if argument.names[-1] not in common:
            shown = argument_head(by_long_name(argument))
            words.append(f"[{shown}]")
    for argument in command.operands:
        words.append(italic(argument.metavar) + ("..." if argument.many else ""))
    return " ".join(words)


def by_long_name(argument: Argument) -> Argument:
    return dataclasses.replace(argument, names=argument.names[-1:])


def options(program: Program, name: str = "") -> Iterator[str]:
    """Of the program, or of one command, with everything."""
    command = program.own if not name else next(each for each in program.commands if each.name == name)
    for argument in command.options:
        yield from item(argument_head(argument), sentence(argument.help))


def commands(program: Program) -> Iterator[str]:
    """All commands, each without the options that stand before any command too."""
    common = {argument.names[-1] for argument in program.own.options}
    for command in program.commands:
        yield from (".SS " + command.name, synopsis(command, common), ".PP", roff(sentence(command.description)))
        for argument in command.arguments:
            if argument.names and argument.names[-1] in common:
                continue
            choices = f" One of: {', '.join(argument.choices)}." if argument.choices else ""
            yield from item(argument_head(argument), sentence(argument.help) + choices)


def exit_codes(program: Program) -> Iterator[str]:
    if program.name in EXIT_CODES:
        for code, text in EXIT_CODES[program.name].items():
            yield from item(bold(str(code)), sentence(text))


def config_keys(section: str) -> Iterator[str]:
    for option in OPTIONS:
        if option.section == section:
            yield from item(bold(option.name), config_text(option))


def config_text(option: Option) -> str:
    value, default = wants_text(option), default_value_text(option)
    return f"{option.help} Value: {value}. Default: {default}. Applies at {option.applies}."


def config_sections() -> Iterator[str]:
    for section, shape in SECTIONS.items():
        yield ".SS " + shape.value.format(name=section)
        yield from config_keys(section)


def counters() -> Iterator[str]:
    for counter in COUNTERS:
        kind = ", a gauge" if counter.gauge else ""
        yield from item(bold(f"{counter.role.value}.{counter.name}"), f"{counter.help} ({counter.unit}{kind})")


def reasons(enum: type[CloseReason] | type[RefuseReason]) -> Iterator[str]:
    yield roff(", ".join(reason.word for reason in enum if reason) + ".")


def fill(line: str, known: dict[str, Program]) -> Iterator[str]:
    word, *arguments = line.strip("@").split()
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "OPTIONS": lambda: options(known[arguments[0]], *arguments[1:]),
        "COMMANDS": lambda: commands(known[arguments[0]]),
        "EXIT-CODES": lambda: exit_codes(known[arguments[0]]),
        "CONFIG": config_sections,
        "COUNTERS": counters,
        "CLOSE-REASONS": lambda: reasons(CloseReason),
        "REFUSE-REASONS": lambda: reasons(RefuseReason),
    }
    yield from makers[word]()


def render(template: str) -> str:
    """The page. Raises KeyError for a placeholder that is none."""
    known = programs()
    lines: list[str] = []
    for line in template.splitlines():
        if re.fullmatch(r"@[A-Z-]+( [a-z]+)*@", line):
            lines += fill(line, known)
        else:
            lines.append(line.replace("@VERSION@", VERSION).replace("@DATE@", date()))
    return "\n".join(folded(lines)) + "\n"


def folded(lines: list[str]) -> Iterator[str]:
    """Text lines of a width that roff tools like; macros and examples stay as they are."""
    example = False
    for line in lines:
        example = line != ".EE" and (example or line == ".EX")
        if example or line.startswith((".", "\\fB")) or len(line) <= WIDTH:
            yield line
        else:
            for part in textwrap.wrap(line, WIDTH, break_long_words=False, break_on_hyphens=False):
                yield "\\&" + part if part[0] in ".'" else part


def date() -> str:
    """Of the newest entry of the changelog, so that the same source gives the same page."""
    months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
    found = re.search(r"^ -- .*, (\d{2}) (\w{3}) (\d{4}) ", CHANGELOG.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{CHANGELOG} has no date")
    return f"{found[3]}-{months.index(found[2]) + 1:02d}-{found[1]}"


def main() -> int:
    directory = pathlib.Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for template in sorted(TEMPLATES.glob("*.in")):
        (directory / template.stem).write_text(render(template.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
