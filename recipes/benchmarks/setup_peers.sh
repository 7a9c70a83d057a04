#!/usr/bin/env bash
# One virtual environment per peer under .bench/ (or $1), with the pins in requirements/. Only the peers named after it, if any are, else all.
#   recipes/benchmarks/setup_peers.sh [FOLDER [PEER ...]]
# A peer that cannot be installed or imported leaves its reason in FOLDER/PEER.failed, which `hf-he bench` shows; the script still succeeds.
# FHElium needs a C++ compiler and PyTorch: 5 GB with the wheels of the package index, less where pip finds a CPU build.
set -uo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
target="${1:-$here/../../.bench}"
[ $# -gt 0 ] && shift
mkdir -p "$target"
target="$(cd "$target" && pwd)"

# python_for 3.12: an interpreter of that version with venv, from PATH, pyenv or uv
python_for() {
    local candidate
    for candidate in "python$1" python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python \
        "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}/cpython-$1".*/bin/python3; do
        if "$candidate" -c "import sys, venv; sys.exit(sys.version_info[:2] != tuple(map(int, '$1'.split('.'))))" 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# install NAME MODULE VERSION PIP-ARGUMENTS...: a fresh environment; several PIP-ARGUMENTS sets are separated by --
install() {
    local name="$1" module="$2" wanted="$3" python arguments=() argument
    shift 3
    if ! python="$(python_for "$wanted")"; then
        echo "needs Python $wanted, which was not found on PATH, in pyenv or uv"
        return 1
    fi
    rm -rf "${target:?}/$name"
    "$python" -m venv "$target/$name" || { echo "cannot make an environment with $python"; return 1; }
    for argument in "$@" --; do
        if [ "$argument" != -- ]; then
            arguments+=("$argument")
            continue
        fi
        if ! "$target/$name/bin/python" -m pip install -qq --disable-pip-version-check "${arguments[@]}" > "$target/$name.log" 2>&1; then
            echo "pip could not install it: $(grep -m 1 -i error "$target/$name.log")"
            return 1
        fi
        arguments=()
    done
    [ -z "$module" ] && return 0
    if ! "$target/$name/bin/python" -I -c "import $module" 2> "$target/$name.log"; then
        echo "does not import on Python $wanted: $(tail -n 1 "$target/$name.log")"
        return 1
    fi
}

setup() {
    local pins="$here/requirements"
    case "$1" in
        # Built on Ubuntu 24.04 or 22.04: the older one runs where libstdc++ is older than GCC 13's.
        openfhe) install openfhe openfhe 3.12 -r "$pins/openfhe-py3.12.txt" || install openfhe openfhe 3.10 -r "$pins/openfhe-py3.10.txt" ;;
        tenseal) install tenseal tenseal 3.12 -r "$pins/tenseal-py3.12.txt" ;;
        desilo) install desilo desilofhe 3.12 -r "$pins/desilo-py3.12.txt" ;;
        fhelium)
            CMAKE_ARGS=-DFHELIUM_NATIVE_BACKENDS=CPU install fhelium fhelium 3.12 \
                -r "$pins/fhelium-build-py3.12.txt" -- --no-binary=fhelium --no-build-isolation -r "$pins/fhelium-py3.12.txt"
            ;;
        # Only the shared library in Orion's wheel is used: no PyTorch.
        lattigo) install lattigo "" 3.12 --no-deps -r "$pins/lattigo-py3.12.txt" ;;
        *) echo "unknown peer $1: one of openfhe, tenseal, desilo, fhelium, lattigo"; return 1 ;;
    esac
}

[ $# -eq 0 ] && set -- openfhe tenseal desilo lattigo fhelium
for name in "$@"; do
    if [ -x "$target/$name/bin/python" ] && [ -f "$target/$name/.ready" ]; then
        echo "$name: already there"
        continue
    fi
    rm -f "$target/$name.failed"
    echo "$name: installing"
    if reason="$(setup "$name")"; then
        touch "$target/$name/.ready"
        rm -f "$target/$name.log"
    else
        echo "$reason" | tail -n 1 | tee "$target/$name.failed"
        rm -rf "${target:?}/$name"
    fi
done
