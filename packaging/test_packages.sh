#!/usr/bin/env bash
# Installs the Debian packages that the tests use, those that are missing only, and only as root. Without root, or where
# that fails, it names the line to type; the tests that need them are then skipped and say why. With CI set it exits 1 then.
set -u
cd "$(dirname "$0")/.."

missing=()
has() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }
has socat || missing+=(socat)
nc -h 2>&1 | grep -q OpenBSD || missing+=(netcat-openbsd)
has gcc || missing+=(gcc)
[ -e /usr/include/stdio.h ] || missing+=(libc6-dev)
has mkfs.ext4 || missing+=(e2fsprogs)
has mkfs.xfs || missing+=(xfsprogs)
[ ${#missing[@]} -gt 0 ] || exit 0

line="apt-get install -y --no-install-recommends ${missing[*]}"
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests: some tests are skipped; type: sudo $line" >&2
  [ -z "${CI:-}" ]
  exit
fi
echo "tests: installing ${missing[*]}" >&2
mkdir -p build
if ! { apt-get update -q && DEBIAN_FRONTEND=noninteractive $line; } >build/test_packages.log 2>&1 </dev/null; then
  tail -n 5 build/test_packages.log >&2
  echo "tests: could not install ${missing[*]}, so some tests are skipped; type: $line" >&2
  [ -z "${CI:-}" ]
fi
