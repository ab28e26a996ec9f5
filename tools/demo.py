#!/usr/bin/env python
"""Trains a small RetinaNet plainly and with LabelEnc (step 1, step 2), and reports what came out.

    python tools/demo.py [--dataset <COCO-format folder>] [--output output/demo] [--seed 1]

Step 2 is compared with plain training of as many iterations, of twice as many, and of as many as
both steps have. Without --dataset it trains on the built-in set `shapes`. A run that was
interrupted is continued; remove the output folder to start anew.
"""

from __future__ import annotations

from pathlib import Path

from detectron2.data.detection_utils import convert_image_to_rgb

from labelenc.pictures import label_map_picture
from plaindet.loading import load_tensors

from demo_pictures import DETECTIONS_CAPTION, draw_detections, load_detectors, pictured_images
from demo_runs import (
    REPOSITORY,
    Run,
    dataset_overrides,
    parse_args,
    read_ap,
    results_table,
)
from demo_training import train_all
from detectors import read_cfg
from feature_pictures import draw_encoding, draw_features, picture_mapper
from pictures import save_sheet
from visualize_features import load_label_encoder

CONFIGS = REPOSITORY / "configs" / "demo"
TITLES = {
    "baseline": "baseline",
    "baseline_2x": "baseline, twice the iterations",
    "baseline_total": "baseline, iterations of both steps",
    "labelenc_step1": "LabelEnc, step 1 (its image branch)",
    "labelenc_step2": "LabelEnc, step 2",
}
COSTS = {"labelenc_step1": 2.2, "labelenc_step2": 1.4}
# AP by which a run with another seed easily differs.
SEED_SPREAD = 3.0
# The finest level: on images this small it has the size that the paper's second level has there.
LEVEL = "p3"


def plan_runs(output: Path, overrides: list[str]) -> dict[str, Run]:
    """The runs by their names, in their order."""
    step1_file = output / "labelenc_step1" / "label_encoder.pth"
    overrides = [*overrides, "MODEL.LABELENC.STEP1_FILE", str(step1_file)]
    runs = {}
    for name, title in TITLES.items():
        config = CONFIGS / f"{name}.yaml"
        iterations = total = read_cfg(config, overrides).SOLVER.MAX_ITER
        if name == "labelenc_step2":
            total += runs["labelenc_step1"].iterations
        cost = COSTS.get(name, 1.0)
        runs[name] = Run(output / name, title, config, overrides, iterations, total, cost)
    return runs


def draw_pictures(output: Path, runs: dict[str, Run]) -> None:
    """Label maps, feature maps as in Fig. 3 of the paper, and detections of validation images."""
    step2 = runs["labelenc_step2"]
    cfg = read_cfg(step2.config, step2.overrides)
    images, mapper = pictured_images(cfg.DATASETS.TEST[0]), picture_mapper(cfg)
    step1_file = cfg.MODEL.LABELENC.STEP1_FILE
    label_encoder = load_label_encoder(cfg, load_tensors(step1_file), step1_file)
    detectors = load_detectors(list(runs.values()))

    label_maps, features = [], []
    for inputs in map(mapper, images):
        label_map = inputs["label_map"]
        image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
        label_maps.append([("image", image), ("label map", label_map_picture(image, label_map))])
        features.append([("image", image)])
        for title, model, _ in detectors:
            features[-1].append((title, draw_features(model, inputs, [LEVEL])[0]))
        encoding = draw_encoding(label_encoder, label_map, [LEVEL])[0]
        features[-1].append(("label encoding h(y)", encoding))
    save_sheet(output / "label_maps.png", label_maps)
    save_sheet(output / "features.png", features)
    draw_detections(output / "detections.png", images, detectors)


def compare(ap: dict[str, float]) -> str:
    """What the numbers show, whichever way they come out."""
    lines = [f"Step 2 ({ap['labelenc_step2']:.1f} AP) is", ""]
    others = {
        "baseline": "the baseline with as many iterations as step 2 alone",
        "baseline_2x": "the baseline with twice as many",
        "baseline_total": "the baseline with as many as both steps together",
        "labelenc_step1": "step 1 alone",
    }
    differences = {name: ap["labelenc_step2"] - ap[name] for name in others}
    for name, other in others.items():
        direction = "above" if differences[name] >= 0 else "below"
        lines.append(f"* {abs(differences[name]):.1f} AP {direction} {other} ({ap[name]:.1f}),")
    longest = differences["baseline_total"]
    if differences["baseline"] <= SEED_SPREAD:
        verdict = "So LabelEnc gains nothing here that another seed could not give, too."
    elif longest > SEED_SPREAD:
        verdict = (
            "So LabelEnc gains more here than the same number of plain iterations does. An "
            "iteration of LabelEnc takes longer, though (the last column)."
        )
    elif longest >= -SEED_SPREAD:
        verdict = (
            "So LabelEnc and the same number of plain iterations are about as good here. An "
            "iteration of LabelEnc takes longer (the last column)."
        )
    else:
        verdict = (
            "So step 2 starts better than a plain detector, but the plain detector gains more from "
            "the iterations of step 1 than step 2 does. On schedules as short as these every "
            "detector is on the steep part of its learning curve; the baselines of the paper no "
            "longer gain from further iterations."
        )
    return "\n".join(lines)[:-1] + f".\n\n{verdict}"


def write_report(output: Path, runs: dict[str, Run]) -> Path:
    """Writes report.md: the numbers, and what they can and cannot show."""
    ap = {name: read_ap(run)["AP"] for name, run in runs.items()}
    cfg = read_cfg(runs["baseline"].config, runs["baseline"].overrides)
    report = output / "report.md"
    report.write_text(
        f"""# LabelEnc on {cfg.DATASETS.TRAIN[0]}

A small RetinaNet (ResNet-18 from scratch, images of {cfg.INPUT.MIN_SIZE_TEST} px), trained on
`{cfg.DATASETS.TRAIN[0]}` and evaluated on `{cfg.DATASETS.TEST[0]}`, with the seed {cfg.SEED}.

{results_table(list(runs.values()))}

{compare(ap)}

It is one run of each, far shorter than the schedules of the paper. Another seed moves a row by up
to {SEED_SPREAD:.0f} AP or so (`tools/demo.py --seed 2 --output <another folder>`). Each run ends in
a plain detector: `model_final.pth` and `plain_config.yaml` in its folder.

## Pictures

![label maps](label_maps.png)
The label map y over the image: in each class the ramp of a box is 1 at its centre and 0.5 at its
border (here the maximum over all classes).

![features](features.png)
The intensity of the features at level {LEVEL} (L2 norm of each position) as in Fig. 3 of the paper:
of the detectors, and of the label encoding h(y) that step 2 is supervised with.

![detections](detections.png)
{DETECTIONS_CAPTION}
"""
    )
    return report


def main():
    args = parse_args(__doc__, "output/demo")
    runs = plan_runs(args.output, [*dataset_overrides(args.dataset), "SEED", str(args.seed)])
    train_all(list(runs.values()))
    draw_pictures(args.output, runs)
    report = write_report(args.output, runs)
    print(f"\n{report.read_text()}\nReport: {report}")


if __name__ == "__main__":
    main()
