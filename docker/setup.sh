#!/bin/sh
# Make .venv and install the tested versions into it: with uv where it can be had (seconds), else with pip (minutes).
# Used by the Makefile and the Dockerfile. A .venv with a working Python is kept and brought up to date.
#
#   PYTHON=python3.12   the interpreter to use
#   TORCH=cpu           torch for this backend (cpu, cu126, auto, ...) from PyTorch's own index; needs uv
#   EXTRAS=test,dev,lecture,openmoji,latents,demo     what to install beside the package
#   VENV=.venv          where to
#   LOWEST=1            the oldest versions that pyproject.toml allows in place of the tested ones; needs uv
set -eu
cd "$(dirname "$0")/.."
EXTRAS=${EXTRAS-test,dev,lecture,openmoji,latents,demo}
TORCH=${TORCH-}
VENV=${VENV:-.venv}
LOWEST=${LOWEST-}
venv=$VENV/bin/python

fail() { echo "setup: $*" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    candidates=${PYTHON:-python3 python3.13 python3.12 python3.11}
    for python in $candidates; do
        if is_new_enough "$python"; then return; fi
    done
    fail "Python 3.11 or newer is needed and none was found (tried $candidates):" \
        "install one, or name one with PYTHON=/path/to/python3.12."
}

make_venv() {
    if command -v uv >/dev/null; then
        uv venv --quiet --clear --seed --python "$python" "$VENV"
    elif ! "$python" -m venv --clear "$VENV"; then
        rm -rf "$VENV"
        fail "$python cannot make a virtual environment: install its venv module (Debian: python3-venv), or uv."
    fi
}

find_uv() {
    uv=$(command -v uv) && return
    $venv -m pip install --quiet --retries 1 --only-binary :all: -c constraints.txt uv 2>/dev/null &&
        uv=$VENV/bin/uv && return
    uv=
}

# uv reads none of pip's configuration, so what pip was told about sources is passed on; uv's own variables win.
pip_setting() {
    printf '%s\n' "$pip_settings" | sed -nE "s/^(:env:|install|global)\.$1='(.*)'\$/\2/p" | head -n 1 |
        sed 's/\\n/ /g; s/^ *//; s/ *$//'
}

share_pip_settings() {
    pip_settings=$($venv -m pip config list)
    find_links=${UV_FIND_LINKS:-$(pip_setting find-links | tr -s ' ' ',')}
    index=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-$(pip_setting index-url)}}
    if [ -n "$find_links" ]; then export UV_FIND_LINKS="$find_links"; fi
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
    extra=$(pip_setting extra-index-url)
    if [ -n "$extra" ] && [ -z "${UV_INDEX-}${UV_EXTRA_INDEX_URL-}" ]; then
        export UV_INDEX="$extra" UV_INDEX_STRATEGY=unsafe-best-match # the best of all indexes, as pip does
    fi
}

install() {
    if [ -n "$uv" ]; then
        "$uv" pip install --python $venv ${TORCH:+--torch-backend "$TORCH"} "$@" && return
        if [ -n "$TORCH$LOWEST" ]; then fail "uv could not install it (see above): TORCH=$TORCH LOWEST=$LOWEST."; fi
        echo "setup: uv did not manage; trying pip" >&2
    fi
    $venv -m pip install "$@"
}

if ! is_new_enough $venv; then
    find_python
    make_venv
fi
$venv -c 'import pip' 2>/dev/null || $venv -m ensurepip >/dev/null || fail "the Python in $VENV has no pip: remove $VENV."
find_uv
if [ -n "$TORCH$LOWEST" ] && [ -z "$uv" ]; then
    fail "TORCH and LOWEST need uv, which pip could not install: install uv first."
fi
share_pip_settings
install $(if [ -n "$LOWEST" ]; then echo --resolution lowest-direct; else echo -c constraints.txt; fi) -e ".${EXTRAS:+[$EXTRAS]}"
install --no-deps -r requirements-no-deps.txt
echo "setup: done ($($venv --version), torch $($venv -c 'import importlib.metadata as m; print(m.version("torch"))'))"
