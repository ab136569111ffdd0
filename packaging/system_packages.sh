#!/usr/bin/env bash
# Installs what `make test-system` needs on top of the tests' other packages: those that are missing only, and only as root.
# Without root, or where that fails, it names the line to type; with CI set it exits 1 then, for nothing may be skipped.
set -u
cd "$(dirname "$0")/.."

missing=()
has() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }
has mmdebstrap || missing+=(mmdebstrap)
has systemd-nspawn || missing+=(systemd-container)
has nsenter || missing+=(util-linux)
has pgrep || missing+=(procps)
has dpkg-buildpackage || missing+=(dpkg-dev fakeroot)
has lintian || missing+=(lintian)
has apparmor_parser || missing+=(apparmor)
has mandoc || missing+=(mandoc)
has groff || missing+=(groff)
has fish || missing+=(fish)
has zsh || missing+=(zsh)
[ ${#missing[@]} -gt 0 ] || exit 0

line="apt-get install -y --no-install-recommends ${missing[*]}"
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests: the system tests are skipped; type: sudo $line" >&2
  [ -z "${CI:-}" ]
  exit
fi
echo "tests: installing ${missing[*]}" >&2
mkdir -p build
if ! { apt-get update -q && DEBIAN_FRONTEND=noninteractive $line; } >build/system_packages.log 2>&1 </dev/null; then
  tail -n 5 build/system_packages.log >&2
  echo "tests: could not install ${missing[*]}, so the system tests are skipped; type: $line" >&2
  [ -z "${CI:-}" ]
fi
