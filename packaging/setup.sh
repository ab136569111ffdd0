#!/usr/bin/env bash
# Makes .venv with the pinned packages and this project in it (editable), so that .venv/bin has the three programs.
#
#   packaging/setup.sh run     what the programs need
#   packaging/setup.sh all     and what tests, lint and optional features need
#
# A stamp remembers what was installed, so that a second call does nothing. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-all}
venv=.venv
log=build/setup.log

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$1"; [ -z "${2:-}" ] || say "type: $2"; exit 1; }

files_of() {
  case $1 in
    run) echo build run ;;
    all) echo build run optional test ;;
    *) fail "unknown part '$1': run or all" ;;
  esac
}
files=$(files_of "$what")

version_of() { # prints 3.11 and such; fails when that is no Python that runs
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

find_python() { # the pinned packages exist for 3.11 to 3.14, so those come before anything newer
  local candidate version newer=
  for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
    version=$(version_of "$candidate") || continue
    case $version in
      3.1[1-4]) echo "$candidate"; return ;;
      3.1[5-9] | 3.[2-9]?) newer=${newer:-$candidate} ;;
    esac
  done
  [ -n "$newer" ] && echo "$newer"
}

install_venv_module() { # Debian keeps ensurepip in a package of its own
  local python=$1 package
  package="python$(version_of "$python")-venv"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing $package"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$package"; } \
      >>$log 2>&1 </dev/null || { tail -n 5 $log >&2; fail "could not install $package" "apt-get install $package"; }
  else
    fail "$python cannot make virtual environments" "sudo apt-get install $package"
  fi
}

mkdir -p build
: >$log
python=$(find_python) || fail "needs Python 3.11 or later" "sudo apt-get install python3 python3-venv"

state_of() { # what a finished installation of that part was made from
  "$python" -c 'import sys; print(sys.version, sys.executable)'
  pwd
  cat pyproject.toml
  for file in $(files_of "$1"); do cat "packaging/requirements/$file.txt"; done
}
is_installed() {
  [ -x $venv/bin/mpserverd ] && [ -f "$venv/.installed-$1" ] && [ "$(cat "$venv/.installed-$1")" = "$(state_of "$1")" ]
}
if is_installed all || is_installed "$what"; then
  exit 0
fi

"$python" -c 'import ensurepip, venv' 2>/dev/null || install_venv_module "$python"
if ! $venv/bin/python -m pip --version >/dev/null 2>&1 || [ "$(version_of $venv/bin/python)" != "$(version_of "$python")" ]
then
  say "making $venv with $("$python" --version)"
  "$python" -m venv --clear $venv >>$log 2>&1 || { tail -n 20 $log >&2; fail "could not make $venv"; }
fi

pip() { # quiet when all is well, readable when not
  $venv/bin/python -m pip --no-input --disable-pip-version-check install "$@" >>$log 2>&1 </dev/null ||
    { tail -n 20 $log >&2; fail "pip could not install; the whole log is $log"; }
}

arguments=()
for file in $files; do arguments+=(-r "packaging/requirements/$file.txt"); done
say "installing the pinned packages (${files// /, })"
pip "${arguments[@]}"
say "installing mpserverd"
pip --no-build-isolation --no-deps --editable .
rm -f $venv/.installed-*
state_of "$what" >"$venv/.installed-$what"
say "done: $venv/bin has mpserverd, mpserverctl and mpload"
