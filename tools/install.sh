#!/usr/bin/env bash
# Installs this project, Detectron2 and what both need into the environment of $PYTHON
# (default: python3), with the tested versions of constraints.txt.
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
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DETECTRON2=${DETECTRON2:-}
pip_loudly() { "$PYTHON" -m pip install --disable-pip-version-check -c constraints.txt "$@"; }
pip_install() { pip_loudly --quiet "$@"; }

# Detectron2's setup.py imports torch, so torch comes first.
pip_install torch torchvision numpy "setuptools<81" wheel

# What Detectron2 needs at run time (its wheel below is installed without dependencies).
pip_install fvcore "iopath<0.1.10" "omegaconf<2.4" hydra-core pycocotools opencv-python-headless \
    pillow matplotlib tensorboard termcolor yacs tabulate cloudpickle tqdm packaging

if [ -n "$DETECTRON2" ]; then
    echo "Installing Detectron2 from $DETECTRON2"
    pip_install ninja
    # From source the C++ extension compiles for many minutes, which should not look like a hang.
    pip_loudly --verbose --no-deps --no-build-isolation --force-reinstall "$DETECTRON2"
elif "$PYTHON" -c "import detectron2" 2>/dev/null; then
    echo "Keeping the installed Detectron2"
else
    echo "Installing Detectron2 (sal-detectron2 0.7.2)"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.10 -d "$folder" sal-detectron2==0.7.2
    wheel=$folder/sal_detectron2-0.7.2-py3-none-any.whl
    mv "$folder"/sal_detectron2-0.7.2-*.whl "$wheel"
    "$PYTHON" - "$wheel" <<'CHECK'
import hashlib
import sys

expected = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
found = hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()
if found != expected:
    sys.exit(f"The downloaded Detectron2 has sha256 {found}, expected {expected}: not installed")
CHECK
    pip_install --no-deps "$wheel"
    installed=$("$PYTHON" -c 'from importlib.util import find_spec as f; print(f("detectron2").origin)')
    rm -f "$(dirname "$installed")"/_C.*.so
fi

pip_install --no-build-isolation -e ".[dev,detr,timm]"
"$PYTHON" -c "import detectron2, torch; print('Ready: Detectron2', detectron2.__version__, 'with torch', torch.__version__)"
