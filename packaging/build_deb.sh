#!/usr/bin/env bash
# Builds the Debian packages from this checkout (all that .gitignore does not name, committed or not) with Debian's own
# tools and Python. What comes out lies in build/deb.
#
#   packaging/build_deb.sh [VERSION]    VERSION instead of the one in debian/changelog, for tests of an upgrade
#
# Tests are the job of `make test`. DEB_BUILD_OPTIONS= (empty) runs the unit tests in the build too, as Debian's builders
# do. Missing build dependencies are installed as root, else named.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-}
export DEB_BUILD_OPTIONS=${DEB_BUILD_OPTIONS-nocheck}
out=$PWD/build/deb${version:+-$version}
tree=$out/tree
log=$out/build.log
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

fail() { echo "deb: $1" >&2; exit 1; }

rm -rf "$out"
mkdir -p "$tree"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do [ -L "$file" ] || [ -e "$file" ] && printf '%s\0' "$file"; done |
  tar -c --null -T - | tar -x -C "$tree"

apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -y --no-install-recommends "$@" >>"$log" 2>&1 </dev/null; }
if ! command -v dpkg-buildpackage >/dev/null || ! (cd "$tree" && dpkg-checkbuilddeps 2>>"$log"); then
  line="apt-get install -y --no-install-recommends dpkg-dev fakeroot && apt-get build-dep -y --no-install-recommends $tree"
  [ "$(id -u)" = 0 ] || fail "build dependencies are missing; type: sudo sh -c '$line'"
  echo "deb: installing build dependencies" >&2
  { apt-get update -q >>"$log" 2>&1 && apt_get install dpkg-dev fakeroot && apt_get build-dep "$tree"; } ||
    { tail -n 5 "$log" >&2; fail "could not install the build dependencies; the whole log is $log"; }
fi

cd "$tree"
if [ -n "$version" ]; then
  sed -i "1s/([^)]*)/($version)/" debian/changelog
fi
# -d: dependencies were checked above. The source package is built too, so that it stays buildable.
if ! dpkg-buildpackage --no-sign -d >>"$log" 2>&1; then
  tail -n 40 "$log" >&2
  fail "the build failed; the whole log is $log"
fi
cd "$out"
rm -rf "$tree"
ls "$out"/*.deb
