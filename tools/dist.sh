#!/usr/bin/env bash
# Builds the source distribution, and the wheel from it, into dist/, and tries the wheel as a user
# has it: in a fresh environment, from a folder that has nothing of this project.
#
# The packages that this project needs are those of $PYTHON (default: python3).
set -euo pipefail
PYTHON=$(realpath --no-symlinks "$(command -v "${PYTHON:-python3}")")
cd "$(dirname "$0")/.."
unset PYTHONPATH

rm -rf dist
"$PYTHON" -W ignore -m build --no-isolation --outdir dist .

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv --without-pip "$folder/venv"
fresh=$folder/venv/bin/python
"$PYTHON" -m pip --python "$fresh" install --quiet --disable-pip-version-check --no-index --no-deps \
    dist/*.whl
# The folders alone: an editable installation in them is found by another file, which is not read.
"$PYTHON" -c 'import sys; print(*sys.path[1:], sep="\n")' \
    >"$("$fresh" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/needed.pth"

wheel=$(realpath dist/*.whl)
cd "$folder"
"$fresh" -W ignore - "$folder" <<'CHECK'
import sys

import crosskd
import labelenc
import plaindet
from detectron2.config import LazyConfig

for package in (crosskd, labelenc, plaindet):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
path = plaindet.get_config_file("CrossKD/gfl_R_50_FPN_from_R_101.yaml")
assert path.startswith(sys.argv[1]), path
assert plaindet.read_config(path).MODEL.GFL.NUM_CLASSES == 80
path = plaindet.get_config_file("LazyConfig/retinanet_R_50_FPN_labelenc_step1.py")
assert LazyConfig.load(path).train.max_iter == 120000
CHECK
train=$folder/venv/bin/boosters-train
"$train" --help >help.txt
"$train" --config-file quick/retinanet_R_18_labelenc_step1.yaml MODEL.DEVICE cpu \
    DATALOADER.NUM_WORKERS 0 SOLVER.MAX_ITER 3 DATASETS.TEST "()" OUTPUT_DIR run >log.txt 2>&1 ||
    { cat log.txt; exit 1; }
ls run/model_final.pth run/label_encoder.pth run/plain_config.yaml >/dev/null
echo "$wheel works"
