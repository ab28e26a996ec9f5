"""Every snippet of every README and every page of the documentation runs, each in a process of its
own, as it is printed. Excerpts are in the sources, and links lead to files.

The folder that it runs in has what the text speaks of: a data set, a run, a project. Its command
`python` makes trainings tiny; of configs for COCO it only reads the config.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

import labelenc
import plaindet
import train_net
from labelenc import save_step1_file
from plaindet import find_config, read_config
from plaindet.engine import PlainTrainer, load_lazy_config, write_plain_config
from plaindet.export import export_onnx

from demo_runs import CONFIGS
from study_plan import plan_runs, read_study

REPOSITORY = Path(__file__).parents[2]
READMES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "projects").glob("**/README.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
]
FENCE = re.compile(r'^```(\w*)(?: title="([^"\n]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BLOCKS = [(path, *block) for path in READMES for block in FENCE.findall(path.read_text())]
# With a title they are excerpts of a file.
EXCERPTS = [(source, code) for _, _, source, code in BLOCKS if source]
SNIPPETS = [
    (str(path.relative_to(REPOSITORY)), language, code)
    for path, language, source, code in BLOCKS
    if not source
]
LINK = re.compile(r"\]\(([^)\s:]+)\)")
# What the snippets in Python and yaml are known by.
RESULT = '\ncfg = get_cfg()\ncfg.merge_from_file("output/my_run/plain_config.yaml'
RESULT_OF_PLAINDET = 'add_plaindet_config(cfg)\ncfg.merge_from_file("output/my_run'
OWN_PROJECT = "trainer = PlainTrainer(cfg)"
OWN_TRAINER = "inherit_step1_file(trainer.checkpointer.model"
OWN_TRAINER_WITH_CROSSKD = "import crosskd  # which registers"
OWN_KEYS = "register_config(add_my_config)"
OWN_ADAPTER = "@register_adapter(MyDetector)"
OWN_METHOD = "class FeatureImitation(Method)"
TASK = "task = TrainingTask(build_model(cfg)"
REPLAY = 'replay["batch"]'
BOTH_METHODS = 'TRAINING_METHODS: ("LabelEnc", "CrossKD")'
OWN_BACKBONE = "NAME: convnext_tiny"
ONNX = 'InferenceSession("detector.onnx")'
OWN_STUDY = "title: learning rate 0.04"
PACKAGED_CONFIG = "cfg = read_config(get_config_file("
LAZY_TASK = "model = L(TrainingTask)"
LAZY_SCRIPT = "hook = LabelEncHook(model"
OWN_STEP1 = "# my_gfl_step1.yaml"
CLIPPING = "def clipped_adamw("
OTHERS = [RESULT, RESULT_OF_PLAINDET, OWN_PROJECT, OWN_TRAINER, OWN_TRAINER_WITH_CROSSKD, OWN_KEYS]
OTHERS += [OWN_ADAPTER, OWN_METHOD, TASK, REPLAY, BOTH_METHODS, OWN_BACKBONE, ONNX, OWN_STUDY]
OTHERS += [CLIPPING, OWN_STEP1, PACKAGED_CONFIG, LAZY_TASK, LAZY_SCRIPT]

MY_PROJECT = """
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet

@META_ARCH_REGISTRY.register()
class MyDetector(RetinaNet):
    pass
"""
# Detectron2's tools/train_net.py, which its package does not have.
DETECTRON2_TRAIN_NET = """
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.checkpoint import DetectionCheckpointer

args = default_argument_parser().parse_args()
assert args.eval_only
cfg = get_cfg()
cfg.merge_from_file(args.config_file)
cfg.merge_from_list(args.opts)
register_coco_instances("cells_val", {}, "cells/annotations/val.json", "cells/val")
model = build_model(cfg)
DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
assert "AP" in DefaultTrainer.test(cfg, model, COCOEvaluator("cells_val"))["bbox"]
"""
PYTHON = """#!{python}
import json, os, sys

config = "configs/LabelEnc/retinanet_R_50_FPN_step2.yaml"
args = [config if arg == "..." else arg for arg in sys.argv[1:]]
if args[0] == "train_net.py" and any(arg.startswith("configs/quick/") for arg in args):
    args += {tiny!r}
elif args[0] == "train_net.py":  # for COCO, or on many GPUs
    with open({commands!r}, "a") as file:
        print(json.dumps(args[1:]), file=file)
    sys.exit()
elif args[0] == "tools/lazyconfig_train_net.py":  # Detectron2's, see test_lazyconfig.py
    sys.exit()
elif args[0].startswith("tools/") and args[0] not in {tools!r}:  # see test_tools_start
    sys.exit(not os.path.isfile(args[0]))
elif args[0] == "-" or args[:2] == ["-m", "pip"]:  # of tools/install.sh
    sys.exit()
os.execv({python!r}, [{python!r}, "-W", "ignore", *args])
"""
NODES = ["RETINANET", "FCOS", "GFL", "ATSS", "DEFORMABLE_DETR", "ROI_HEADS"]
CLASSES = [item for node in NODES for item in (f"MODEL.{node}.NUM_CLASSES", "3")]
CELLS = [[f"cells_{x}", f"cells/annotations/{x}.json", f"cells/{x}"] for x in ("train", "val")]
TINY = [
    *("DATASETS.COCO_FORMAT", str(CELLS), "DATASETS.TRAIN", "('cells_train',)"),
    *("DATASETS.TEST", "('cells_val',)", *CLASSES),
    *("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", "SOLVER.IMS_PER_BATCH", "2", "SEED", "1"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.DEVICE", "cpu"),
]
PHASES = ["MODEL.LABELENC.WARMUP_ITERS", "1", "MODEL.LABELENC.CUTOFF_ITERS", "1"]
TEACHER = [
    "MODEL.CROSSKD.TEACHER.OPTS",
    str([*CLASSES, "DATASETS.TRAIN", "('cells_train',)"]),
]
RECIPE_OPTIONS = ["--config-file", "configs/quick/retinanet_R_18_labelenc_step1.yaml"]


def snippet(text):
    """The one that has a text."""
    (found,) = [code for *_, code in SNIPPETS if text in code]
    return found


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("configs", "train_net.py", "constraints.txt", "setup.cfg", "pyproject.toml"):
        (folder / name).symlink_to(REPOSITORY / name)
    for name in ("Makefile", "docs"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "tools").mkdir()
    for path in (REPOSITORY / "tools").iterdir():
        (folder / "tools" / path.name).symlink_to(path)
    (folder / "tools" / "train_net.py").write_text(DETECTRON2_TRAIN_NET)
    shutil.copytree(Path(tiny_data[0][1]).parent.parent, folder / "cells")
    shutil.copy(folder / "cells" / "val" / "1.png", folder / "image.jpg")
    (folder / "my_project.py").write_text(MY_PROJECT)
    (folder / "my_retinanet.yaml").write_text(
        "_BASE_: configs/quick/retinanet_R_18_baseline.yaml\n"
    )
    (folder / "bin").mkdir()
    tools = [f"tools/{name}.py" for name in ("train_net", "visualize_features")]
    tools += ["tools/visualize_label_maps.py", "tools/visualize_distillation.py"]
    values = {
        "repository": str(REPOSITORY),
        "python": sys.executable,
        "tiny": [*TINY, *PHASES, *TEACHER],
        "tools": tools,
        "commands": str(folder / "commands.json"),
    }
    (folder / "bin" / "pip").write_text("#!/bin/bash\n[ $1 = install ]\n")
    (folder / "bin" / "boosters-train").write_text('#!/bin/bash\npython train_net.py "$@"\n')
    for name in ("pip", "boosters-train"):
        (folder / "bin" / name).chmod(0o755)
    for name in ("bin/python", ".venv/bin/python"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PYTHON.format(**values))
        path.chmod(0o755)
    return folder


@pytest.fixture
def run(workspace):
    """Returns a function that runs a command in the folder, and returns its output."""

    def run_command(command, **environment):
        paths = {"PATH": f"{workspace}/bin", "PYTHONPATH": f"{workspace}"}
        paths = {key: f"{path}:{os.environ.get(key, '')}" for key, path in paths.items()}
        result = subprocess.run(
            command,
            cwd=workspace,
            env={**os.environ, "OMP_NUM_THREADS": "1", **paths, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-3000:]
        return result.stdout

    return run_command


@pytest.fixture
def run_python(run, workspace):
    """Returns a function that runs a snippet as a script with arguments."""

    def run_script(code, *arguments, **environment):
        (workspace / "script.py").write_text(code)
        return run([sys.executable, "-W", "ignore", "script.py", *arguments], **environment)

    return run_script


def save_run(make_cfg, workspace, detector, name="my_run", config=None):
    """A run with random weights, as `train_net.py` leaves it."""
    folder = workspace / "output" / name
    folder.mkdir(parents=True, exist_ok=True)
    config = config or f"quick/{detector}_R_18_baseline.yaml"
    cfg = make_cfg(config, "OUTPUT_DIR", str(folder), "DATASETS.TEST", "('cells_val',)")
    model = build_model(cfg)
    write_plain_config(cfg, model)
    for file in ("model_final", "model_0000001"):
        DetectionCheckpointer(model, str(folder)).save(file)
    return folder


BASH = [code for _, language, code in SNIPPETS if language == "bash"]
# Those that train for real take a while, and train what other tests train.
TRAINS = "configs/quick/"


@pytest.mark.parametrize("number", range(len(BASH)))
def test_syntax_of_shell_snippets(number):
    subprocess.run(["bash", "-n"], input=BASH[number], text=True, check=True)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            code,
            id=" ".join(code.split()[:3]),
            marks=pytest.mark.long if TRAINS in code and "data=(" not in code else (),
        )
        for code in BASH
        if "#SBATCH" not in code
    ],
)
def test_shell(run, make_cfg, workspace, monkeypatch, code):
    run_shell(run, make_cfg, workspace, code)
    commands = workspace / "commands.json"
    if commands.exists():
        monkeypatch.chdir(workspace)
        for line in commands.read_text().splitlines():
            args = train_net.default_argument_parser().parse_args(json.loads(line))
            config_file = find_config(args.config_file)
            read = load_lazy_config if config_file.endswith(".py") else read_config
            read(config_file, args.opts)
        commands.unlink()


def test_tools_start(run):
    """Those that snippets name, one after the other in a process, since each imports the same."""
    tools = sorted(set(re.findall(r"python (tools/\w+\.py)", "".join(BASH))))
    tools = [tool for tool in tools if (REPOSITORY / tool).is_file()]  # and not Detectron2's
    assert "tools/export.py" in tools
    code = f"""
import runpy, sys

sys.path.insert(0, "tools")
for tool in {tools}:
    sys.argv = [tool, "--help"]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as end:
        assert not end.code, tool
"""
    assert run([sys.executable, "-W", "ignore", "-c", code]).count("usage:") == len(tools)


def run_shell(run, make_cfg, workspace, code):
    save_run(make_cfg, workspace, "retinanet")
    (workspace / "my_backbone.yaml").write_text(snippet(OWN_BACKBONE))
    if "visualize_" in code:
        for name in re.findall(r"output/(quick/\w+)/model_final.pth", code):
            save_run(make_cfg, workspace, None, name, f"{name}.yaml")
    if "my_run" in code:
        return run(["bash", "-ec", code])
    run(["bash", "-ec", f'make() {{ command make -n "$@"; }}\n{code}'])


def test_using_the_result(run_python, make_cfg, workspace):
    save_run(make_cfg, workspace, "retinanet")
    run_python(snippet(RESULT))


def test_using_an_onnx_file(run_python, make_cfg, workspace):
    model = build_model(make_cfg("quick/retinanet_R_18_baseline.yaml"))
    (workspace / "detector.onnx").write_bytes(export_onnx(model, torch.zeros(3, 128, 128)))
    run_python(snippet(ONNX))


@pytest.mark.parametrize("detector", ["fcos", "gfl", "deformable_detr"])
def test_using_the_result_of_plaindet(run_python, make_cfg, workspace, detector):
    save_run(make_cfg, workspace, detector)
    run_python(snippet(RESULT_OF_PLAINDET))


def test_own_backbone(run, workspace):
    """A training, without the download."""
    (workspace / "my_backbone.yaml").write_text(snippet(OWN_BACKBONE))
    command = [sys.executable, "train_net.py", "--config-file", "my_backbone.yaml", *TINY]
    run([*command, "MODEL.TIMM.PRETRAINED", "False", "OUTPUT_DIR", "output/my_backbone"])
    assert (workspace / "output" / "my_backbone" / "model_final.pth").is_file()


def test_own_project(run_python, workspace):
    code = snippet(OWN_PROJECT)
    train = "cfg.merge_from_list(TINY)\nregister_coco_format(cfg.DATASETS.COCO_FORMAT)\ntrainer ="
    code = f"from plaindet.data import register_coco_format\nTINY = {[*TINY, *PHASES]}\n" + code
    run_python(code.replace("trainer =", train, 1))


def test_own_trainer(run_python, workspace):
    """It writes the step-1 file, and a killed and resumed run ends as an uninterrupted one; step 2
    takes the file."""
    code = snippet(OWN_TRAINER)
    options = [*RECIPE_OPTIONS, *TINY, "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2"]
    options += ["MODEL.LABELENC.WARMUP_ITERS", "3", "TEST.EVAL_PERIOD", "0", "SOLVER.STEPS", "(5,)"]
    run_python(code, *options, "OUTPUT_DIR", "output/whole")
    killed = code.replace(
        "    trainer.train()",
        "    trainer.after_step = lambda: (super(MyTrainer, trainer).after_step(), "
        "__import__('os')._exit(0) if trainer.iter == 3 else None)\n    trainer.train()",
    )
    run_python(killed, *options, "OUTPUT_DIR", "output/killed")
    run_python(code, "--resume", *options, "OUTPUT_DIR", "output/killed")
    whole, resumed = (workspace / "output" / name for name in ("whole", "killed"))
    assert "Starting training from iteration 4" in (resumed / "log.txt").read_text()
    for file in ("model_final.pth", "label_encoder.pth"):
        expected, found = (torch.load(x / file, weights_only=False) for x in (whole, resumed))
        assert_equal(expected, found)
    checkpoint = torch.load(whole / "model_final.pth", weights_only=False)
    assert {"model", "training_only"} <= checkpoint.keys()

    options[1] = options[1].replace("step1", "step2")
    options += ["MODEL.LABELENC.STEP1_FILE", str(whole / "label_encoder.pth"), "SEED", "-1"]
    run_python(code, *options, "OUTPUT_DIR", "output/step2")
    log = (workspace / "output" / "step2" / "log.txt").read_text()
    assert "Skip" not in log
    assert (workspace / "output" / "step2" / "model_final.pth").exists()


def assert_equal(expected, found, path=""):
    assert type(expected) is type(found)
    if isinstance(expected, dict):
        assert expected.keys() == found.keys()
        for key in expected:
            assert_equal(expected[key], found[key], f"{path}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found), path
    elif isinstance(expected, list):
        for i, pair in enumerate(zip(expected, found)):
            assert_equal(*pair, f"{path}/{i}")


def test_own_trainer_with_crosskd(run_python, make_cfg, workspace):
    save_run(make_cfg, workspace, "retinanet", "teacher", "quick/retinanet_R_34_teacher.yaml")
    files = ["CONFIG_FILE", "output/teacher/plain_config.yaml"]
    files += ["MODEL.CROSSKD.TEACHER.WEIGHTS", "output/teacher/model_final.pth"]
    options = ["--config-file", "configs/quick/retinanet_R_18_crosskd.yaml", *TINY]
    options += TEACHER
    options += [f"MODEL.CROSSKD.TEACHER.{files[0]}", *files[1:], "OUTPUT_DIR", "output/crosskd"]
    run_python(snippet(OWN_TRAINER_WITH_CROSSKD), *options)
    assert "loss_kd_cls" in (workspace / "output/crosskd/metrics.json").read_text()


def test_keys_of_a_project(run_python, run, workspace):
    """With PLAINDET_PROJECTS, `train_net.py` knows them."""
    code = snippet(OWN_KEYS)
    run_python(code)
    (workspace / "my_keys.py").write_text(code)
    options = ["--config-file", "configs/quick/retinanet_R_18_baseline.yaml", *TINY]
    options += ["MODEL.MY_DETECTOR.WIDTH", "32", "OUTPUT_DIR", "output/my_keys"]
    run([f"{workspace}/bin/python", "train_net.py", *options], PLAINDET_PROJECTS="my_keys")
    text = (workspace / "output" / "my_keys" / "plain_config.yaml").read_text()
    assert "MY_DETECTOR:\n    WIDTH: 32" in text


@pytest.mark.parametrize("text", [OWN_ADAPTER, TASK, PACKAGED_CONFIG, LAZY_TASK])
def test_parts_of_a_task(run_python, text):
    run_python(snippet(text))


def test_clipping_of_a_lazy_config():
    scope = {}
    exec(snippet(CLIPPING), scope)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([100.0])
    scope["clipped_adamw"]([{"params": [parameter]}], lr=0.1).step()
    assert parameter.grad.item() == 1.0  # CLIP_VALUE


def test_own_step1(workspace):
    """A detector without a config has the paper's schedule."""
    (workspace / "my_gfl_step1.yaml").write_text(snippet(OWN_STEP1))
    cfg = read_config(str(workspace / "my_gfl_step1.yaml"))
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.TRAINING_METHODS) == ("GFL", ("LabelEnc",))
    assert (cfg.MODEL.LABELENC.STEP, cfg.SOLVER.MAX_ITER) == (1, 120000)


def test_own_method(run_python, run, make_cfg, workspace):
    """In one file of at most 60 lines, without an edit elsewhere."""
    save_run(make_cfg, workspace, "retinanet", "my_teacher")
    code = snippet(OWN_METHOD)
    assert code.count("\n") <= 60
    (workspace / "my_method.py").write_text(code)
    command = next(x for x in BASH if "FeatureImitation" in x)
    run(["bash", "-ec", command])
    (log,) = workspace.glob("output/quick/retinanet_R_18_baseline/metrics.json")
    assert '"loss_imitation"' in log.read_text()
    assert "META_ARCHITECTURE: RetinaNet" in (log.parent / "plain_config.yaml").read_text()


def test_lines_of_a_lazy_script(make_cfg, workspace, monkeypatch):
    model = build_model(make_cfg("quick/retinanet_R_18_labelenc_step1.yaml"))
    (workspace / "output" / "step1").mkdir(parents=True)
    save_step1_file(model, str(workspace / "output" / "step1" / "label_encoder.pth"))
    monkeypatch.chdir(workspace)
    checkpointer = DetectionCheckpointer(model, "output/step1")
    given = {"model": model, "trainer": Mock(), "checkpointer": checkpointer}
    given.update(warmup_iters=1, max_iter=2, output_dir="output/step1")
    exec(snippet(LAZY_SCRIPT), vars(labelenc) | vars(plaindet) | given)
    given["trainer"].register_hooks.assert_called_once()
    assert "training_only" in checkpointer.checkpointables


def test_replay(run_python, make_cfg, workspace):
    folder = save_run(make_cfg, workspace, "retinanet")
    trainer = PlainTrainer(make_cfg("quick/retinanet_R_18_baseline.yaml"))
    replay = {"batch": next(iter(trainer.data_loader)), "losses": {"loss_cls": float("nan")}}
    torch.save(replay, folder / "nonfinite_0000002_process0.pth")
    assert "loss_box_reg" in run_python(snippet(REPLAY))


def test_options_of_fcos(read_cfg):
    options = snippet("MODEL.FCOS.LEVEL_SCALES False").split()
    read_cfg("quick/fcos_R_18_baseline.yaml").merge_from_list(options)


def test_config_of_both_methods(run, workspace):
    folder = workspace / "my" / "configs"
    folder.mkdir(parents=True)
    (workspace / "my" / "LabelEnc").symlink_to(REPOSITORY / "configs" / "LabelEnc")
    base = REPOSITORY / "configs" / "quick" / "gfl_R_18_crosskd.yaml"
    (folder / "my_crosskd.yaml").write_text(f"_BASE_: {base}\n")
    (folder / "both.yaml").write_text(snippet(BOTH_METHODS))
    run([f"{workspace}/bin/python", "train_net.py", "--config-file", "my/configs/both.yaml"])


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False)])
def test_slurm_script(run, workspace, tmp_path, code, requeued):
    """On one of two machines, whose training ends with an exit code."""
    log = tmp_path / "requeued"
    commands = {
        "srun": f'[ "$1 $2" = "--wait=60 --cpus-per-task=64" ] || exit 3\n'
        f'shift 2\n"$@" || exit 4\nexit {code}',
        "scontrol": f'[ "$1" = show ] && echo first || echo "$@" > {log}',
    }
    for name, text in commands.items():
        (workspace / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (workspace / "bin" / name).chmod(0o755)
    (script,) = [x for x in BASH if "#SBATCH" in x]
    (workspace / "job.sh").write_text(script)
    ids = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    ids["SLURM_CPUS_PER_TASK"] = "64"
    run(["bash", "-c", f"bash job.sh; [ $? = {code} ]"], **ids, SLURM_JOB_NODELIST="both")
    assert log.exists() == requeued
    if requeued:
        assert log.read_text().split() == ["requeue", "12345"]
    commands = workspace / "commands.json"
    command = json.loads(commands.read_text().splitlines()[-1])
    commands.unlink()
    args = train_net.default_argument_parser().parse_args(command)
    assert args.resume
    assert (args.num_machines, args.machine_rank) == (2, 1)
    assert args.dist_url == "tcp://first:22345"
    read_config(REPOSITORY / args.config_file, args.opts)


def test_own_study(workspace, tmp_path):
    path = workspace / "my_study.yaml"
    path.write_text(snippet(OWN_STUDY))
    runs = plan_runs(read_study(str(path)), "retinanet", "shapes", 1, tmp_path)
    cfgs = [read_config(CONFIGS / x.config, x.overrides) for x in runs.values()]
    assert [cfg.SOLVER.BASE_LR for cfg in cfgs] == [0.02, 0.04]


@pytest.mark.parametrize(("source", "code"), EXCERPTS)
def test_excerpts_are_in_the_sources(source, code):
    """As they are but for indentation and the wrapping of lines."""
    found, text = ("".join(x.split()) for x in (code, (REPOSITORY / source).read_text()))
    assert found in text


@pytest.mark.parametrize("path", READMES, ids=lambda x: str(x.relative_to(REPOSITORY)))
def test_links(path):
    """To files. `make docs` checks those to headings too, of all that is on the site."""
    for link in LINK.findall(FENCE.sub("", path.read_text())):
        file = link.partition("#")[0]
        assert not file or (path.parent / file).exists(), link


def test_all_snippets_are_tested():
    """The shell's all are, by `test_shell`; each of the others is one of these."""
    for file, language, code in SNIPPETS:
        assert language in ("bash", "python", "yaml", "text", "math"), (file, code)
        if language in ("python", "yaml"):
            assert any(text in code for text in OTHERS), (file, code)
