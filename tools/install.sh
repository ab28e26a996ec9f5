#!/usr/bin/env bash
# Installs this project, Detectron2 and what both need into the environment of $PYTHON
# (default: python3), with the tested versions of constraints.txt.
#
# Without an index:
#   WHEELS=<folder that tools/wheels.sh has filled>
# installs from that folder alone. PyTorch and torchvision are those of the environment, and so is
# whatever else is there in a version that setup.cfg allows.
#
# Detectron2's authors do not publish it on the package index. A Detectron2 that is already
# installed in the environment is kept. Otherwise the default is sal-detectron2 0.7.2 from the
# index, a re-publication whose Python files equal the official commit a59f056 (2024-04-17). Its
# wheel is tagged for CPython 3.10. Nothing here needs the compiled extension in it, which is for
# that version and for one of PyTorch and CUDA, so the wheel is checked by its hash, installed
# under a tag that fits every Python 3, and the extension is removed.
# Choose another with
#   DETECTRON2=<pip requirement or source folder>, such as
#   DETECTRON2=git+https://github.com/facebookresearch/detectron2   (built from source)
set -euo pipefail
PYTHON=${PYTHON:-python3}
DETECTRON2=${DETECTRON2:-}
WHEELS=${WHEELS:-}
fail() {
    echo "$1" >&2
    exit 1
}
if [ -n "$WHEELS" ]; then
    [ -d "$WHEELS" ] || fail "WHEELS: there is no folder $WHEELS"
    WHEELS=$(cd "$WHEELS" && pwd)
fi
cd "$(dirname "$0")/.."

options=(-c constraints.txt)
if [ -n "$WHEELS" ]; then
    options=(--no-index --find-links "$WHEELS")
    export PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= # which may name other places
fi
# Not compiled: most is never imported, and Python compiles the rest when it first is.
pip_loudly() { "$PYTHON" -m pip install --no-compile --disable-pip-version-check "${options[@]}" "$@"; }
pip_install() { pip_loudly --quiet "$@"; }

# Detectron2's setup.py imports torch, so torch comes first. Its wheel below is installed without
# dependencies.
if [ -n "$WHEELS" ]; then
    "$PYTHON" -c "import torch, torchvision" 2>/dev/null ||
        fail "WHEELS installs no PyTorch, and $PYTHON cannot import torch and torchvision: install
them there first, or set PYTHON (make: VENV) to an environment that has them"
    # shellcheck disable=SC2046
    pip_install -r tools/requirements.txt $("$PYTHON" tools/requirements.py)
else
    pip_install torch torchvision
    pip_install -r tools/requirements.txt
fi

if [ -n "$DETECTRON2" ]; then
    echo "Installing Detectron2 from $DETECTRON2"
    pip_install ninja || echo "Building without ninja, which takes longer"
    # From source the C++ extension compiles for many minutes, which should not look like a hang.
    pip_loudly --verbose --no-deps --no-build-isolation --force-reinstall "$DETECTRON2"
elif "$PYTHON" -c "import detectron2" 2>/dev/null; then
    echo "Keeping the installed Detectron2"
else
    echo "Installing Detectron2 (sal-detectron2 0.7.2)"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    if [ -n "$WHEELS" ]; then
        cp "$WHEELS"/sal_detectron2-0.7.2-*.whl "$folder" ||
            fail "$WHEELS has no wheel of sal-detectron2 0.7.2: see tools/wheels.sh"
    else
        "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps \
            --only-binary=:all: --python-version 3.10 -d "$folder" sal-detectron2==0.7.2
    fi
    wheel=$folder/sal_detectron2-0.7.2-py3-none-any.whl
    mv "$folder"/sal_detectron2-0.7.2-*.whl "$wheel"
    "$PYTHON" - "$wheel" <<'CHECK'
import hashlib
import sys

expected = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
found = hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()
if found != expected:
    sys.exit(f"The wheel of Detectron2 has sha256 {found}, expected {expected}: not installed")
CHECK
    pip_install --no-deps "$wheel"
    installed=$("$PYTHON" -c 'from importlib.util import find_spec as f; print(f("detectron2").origin)')
    rm -f "$(dirname "$installed")"/_C.*.so
fi

if [ -n "$WHEELS" ]; then
    pip_install --no-build-isolation --no-deps -e .
else
    pip_install --no-build-isolation -e ".[dev,detr,timm,export]"
fi
"$PYTHON" -c "import detectron2, torch; print('Ready: Detectron2', detectron2.__version__, 'with torch', torch.__version__)"
