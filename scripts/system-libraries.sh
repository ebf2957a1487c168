#!/bin/sh
# Install what a real napari window needs on Debian or Ubuntu: a virtual screen and Qt's system libraries.
# Asks for nothing: where it may not install, it prints the line to run and lets the tests go on; those that
# open a window then skip.
set -eu

packages="xvfb xauth libegl1 libgl1 libgl1-mesa-dri libglib2.0-0 libdbus-1-3 libfontconfig1 libxkbcommon-x11-0
libxcb-cursor0 libxcb-icccm4 libxcb-keysyms1 libxcb-shape0 libgssapi-krb5-2 libsqlite3-0"

case $(uname -s) in
Linux) ;;
*) exit 0 ;; # macOS and Windows bring a screen and the libraries
esac
if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-query >/dev/null 2>&1; then
    echo "Tests that open a window need Xvfb and the xcb libraries of Qt; install your system's equivalents of:" >&2
    echo "   " $packages >&2
    exit 0
fi

installed() {
    # Newer releases add t64 to the names of some libraries.
    dpkg-query -W -f '${Status}\n' "$1" "$1t64" 2>/dev/null | grep -q 'install ok installed'
}

missing=""
for package in $packages; do
    installed "$package" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

line="apt-get update && apt-get install -y --no-install-recommends$missing"
if [ "$(id -u)" -eq 0 ]; then
    run="env DEBIAN_FRONTEND=noninteractive sh -c"
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    run="sudo -n env DEBIAN_FRONTEND=noninteractive sh -c"
else
    run=""
fi
if [ -n "$run" ] && $run "$line"; then
    exit 0
fi
echo "Tests that open a window will be skipped: these system libraries are missing. As root, run" >&2
echo "    $line" >&2
