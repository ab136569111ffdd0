"""Writes shell completions: ``completion.py DIRECTORY`` fills bash/, zsh/ and fish/ in it, a file a program and shell.

They are static: pressing Tab starts no program of ours. Values are completed where they are words or paths.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

from command_lines import DIRECTORY_METAVARS, Argument, Command, Program, programs

# -- bash


def bash(program: Program) -> str:
    function = "_" + program.name
    everything = [program.own, *program.commands]
    takes_value = sorted({n for c in everything for a in c.options if a.metavar for n in a.names})
    lines = [
        f"# bash completion of {program.name}",
        f"{function}() {{",
        '    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command="" words="" i',
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        case ${COMP_WORDS[i]} in",
        *([f"            {'|'.join(takes_value)}) ((i++)) ;;"] if takes_value else []),
    ]
    if program.commands:
        names = "|".join(command.name for command in program.commands)
        lines.append(f"            {names}) command=${{COMP_WORDS[i]}}; break ;;")
    lines += ["        esac", "    done", '    case "$command $prev" in']
    for command in everything:
        for argument in command.options:
            for name in argument.names if argument.metavar else ():
                lines.append(f'        "{command.name} {name}") {_bash_value(argument)}; return ;;')
    if program.default:
        implied = next(command for command in program.commands if command.name == program.default)
        for argument in implied.options:
            for name in argument.names if argument.metavar else ():
                lines.append(f'        " {name}") {_bash_value(argument)}; return ;;')
    lines += ["    esac", "    case $command in"]
    for command in everything:
        words = _words(program, command)
        lines.append(f"        {command.name or repr('')}) words='{' '.join(words)}' ;;")
    lines += [
        "    esac",
        '    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")',
        "}",
        f"complete -F {function} {program.name}",
    ]
    return "\n".join(lines) + "\n"


def _bash_value(argument: Argument) -> str:
    if argument.choices:
        return f"mapfile -t COMPREPLY < <(compgen -W '{' '.join(argument.choices)}' -- \"$cur\")"
    if argument.takes_path:
        kind = "-d" if argument.metavar in DIRECTORY_METAVARS else "-f"
        return f'compopt -o filenames 2>/dev/null || :; mapfile -t COMPREPLY < <(compgen {kind} -- "$cur")'
    return "COMPREPLY=()"


def _words(program: Program, command: Command) -> list[str]:
    words = [name for argument in command.options for name in argument.names]
    words += [choice for argument in command.operands for choice in argument.choices]
    if not command.name:
        words += [each.name for each in program.commands]
        implied = [each for each in program.commands if each.name == program.default]
        words += [name for each in implied for argument in each.options for name in argument.names]
    return list(dict.fromkeys(words))


# -- zsh


def zsh(program: Program) -> str:
    lines = [f"#compdef {program.name}", "", "local context state state_descr line", "typeset -A opt_args", ""]
    own = list(_zsh_specs(program.own))
    if not program.commands:
        return "\n".join([*lines, "_arguments -s \\", *_continued(own)]) + "\n"
    implied = next((each for each in program.commands if each.name == program.default), None)
    specs = own + (list(_zsh_specs(implied, leave_out=_names(program.own))) if implied else [])
    lines += [
        "_arguments -C -s \\",
        *(f"    {spec} \\" for spec in specs),
        "    '1: :->command' \\",
        "    '*:: :->arguments' && return",
        "",
        "case $state in",
        "    (command)",
        "        local -a commands=(",
        *(f"            {_quoted(f'{command.name}:{command.help}')}" for command in program.commands),
        "        )",
        "        _describe command commands ;;",
        "    (arguments)",
        "        case $words[1] in",
    ]
    for command in program.commands:
        lines += [f"            ({command.name})", "                _arguments -s \\"]
        lines += [f"            {line}" for line in _continued(list(_zsh_specs(command)))]
        lines[-1] += " ;;"
    lines += ["        esac ;;", "esac"]
    return "\n".join(lines) + "\n"


def _names(command: Command) -> set[str]:
    return {name for argument in command.options for name in argument.names}


def _continued(specs: list[str]) -> list[str]:
    return [f"    {spec}" + (" \\" if spec is not specs[-1] else "") for spec in specs]


def _zsh_specs(command: Command, leave_out: set[str] = frozenset()) -> Iterator[str]:  # type: ignore[assignment]
    for argument in command.options:
        if leave_out & set(argument.names):
            continue
        text = argument.help.replace("[", "(").replace("]", ")").replace(":", "\\:").replace("`", "")
        for name in argument.names:
            others = " ".join(each for each in argument.names if each != name)
            excluded = f"({others})" if others else ""
            yield _quoted(f"{excluded}{name}[{text}]{_zsh_value(argument)}")
    for argument in command.operands:
        yield _quoted(("*" if argument.many else "1") + _zsh_value(argument))


def _zsh_value(argument: Argument) -> str:
    if not argument.metavar:
        return ""
    name = argument.metavar.replace(":", " ")
    if argument.choices:
        return f":{name}:({' '.join(argument.choices)})"
    if argument.takes_path:
        return f":{name}:_files" + (" -/" if argument.metavar in DIRECTORY_METAVARS else "")
    return f":{name}: "


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# -- fish


def fish(program: Program) -> str:
    lines = [f"# fish completion of {program.name}", f"complete -c {program.name} -f"]
    names = " ".join(command.name for command in program.commands)
    for command in [program.own, *program.commands]:
        conditions = [f"__fish_seen_subcommand_from {command.name}"] if command.name else [""]
        if command.name and command.name == program.default:
            conditions.append(f"not __fish_seen_subcommand_from {names}")
        for condition in conditions:
            for argument in command.arguments:
                if condition.startswith("not ") and _names(program.own) & set(argument.names):
                    continue
                lines.append(_fish_line(program, argument, condition))
    for command in program.commands:
        condition = f"not __fish_seen_subcommand_from {names}"
        lines.append(f"complete -c {program.name} -n '{condition}' -a {command.name} -d {_fish_quoted(command.help)}")
    return "\n".join(dict.fromkeys(line for line in lines if line)) + "\n"


def _fish_line(program: Program, argument: Argument, condition: str) -> str:
    words = [f"complete -c {program.name}"]
    if condition:
        words.append(f"-n '{condition}'")
    for name in argument.names:
        words.append(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}")
    if argument.choices:
        words.append(("-x " if argument.names else "") + f"-a '{' '.join(argument.choices)}'")
    elif not argument.names:
        return ""
    elif argument.takes_path:
        words.append("-r -F")
    elif argument.metavar:
        words.append("-x")
    words.append(f"-d {_fish_quoted(argument.help)}")
    return " ".join(words)


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("`", "").replace("\\", "\\\\").replace("'", "\\'") + "'"


def main() -> int:
    root = pathlib.Path(sys.argv[1])
    shells = {"bash": (bash, "{}"), "zsh": (zsh, "_{}"), "fish": (fish, "{}.fish")}
    for shell, (make, name) in shells.items():
        (root / shell).mkdir(parents=True, exist_ok=True)
        for program in programs().values():
            (root / shell / name.format(program.name)).write_text(make(program))
    return 0


if __name__ == "__main__":
    sys.exit(main())
