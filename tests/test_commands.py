"""The command, as a user runs it: train, evaluate, detect and export on the sample."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssd_ext import MultiBoxLoss, checkpoint, cli, export
from ssd_ext.cli._shared import read_classes, read_data
from ssd_ext.cli.detect import _distinct_names, image_files
from ssd_ext.cli.train import recipe_of
from ssd_ext.data import load_dataset
from ssd_ext.inference import as_json, draw, filter_by_score, load_detector
from ssd_ext.models import create, ssd300_vgg16, ssdlite320_mobilenet_v2

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "samples" / "playing_cards"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
SMALL = ("--model", "ssdlite320_mobilenet_v2", "--image-size", "160", "160", "--workers", "0")


def command(name, *arguments, start=False, **environment):
    line = [sys.executable, "-m", "ssd_ext", name, *map(str, arguments)]
    env = {**ENVIRONMENT, **environment}
    if start:
        return subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_learns_photographs_by_heart_and_finds_their_cards(tmp_path):
    pytest.importorskip("pycocotools")
    run = tmp_path / "run"
    recipe = ("--epochs", 60, "--batch-size", 6, "--optimizer", "sgd", "--lr", 0.03, "--warmup", 10, "--channels-last")
    recipe += ("--no-crop", "--flip", 0, "--zoom-out", 0, "--photometric", 0)
    done = command("train", SAMPLE, "--out", run, *SMALL, *recipe)
    assert done.returncode == 0, done.stderr
    history = checkpoint.load(run / "last.pt")["training"]["history"]
    assert len(history) == 60
    assert history[-1]["classification"] < 0.2
    assert history[-1]["bbox_regression"] < 0.2
    assert (run / "curves.png").stat().st_size > 1000

    figures = run / "figures.json"
    done = command(
        "evaluate", SAMPLE, "--split", "train", "--weights", run / "last.pt", "--json", figures,
        "--metrics", "voc12", "voc07", "coco", "--plot", run / "pr.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["voc12"]["mAP"] > 0.5, done.stdout
    assert found["voc07"]["mAP"] > 0.5
    assert found["coco"]["AP50"] > 0.5
    assert (run / "pr.png").stat().st_size > 1000

    names = (SAMPLE / "ImageSets/Main/train.txt").read_text().split()
    photographs = [next((SAMPLE / "JPEGImages").glob(name + ".*")) for name in names]
    done = command("detect", *photographs, "--weights", run / "last.pt", "--out", run / "found", "--threshold", 0.2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+\.\d images/s \(one image at a time, without reading and drawing\)", done.stdout)
    found = json.loads((run / "found" / "detections.json").read_text())
    assert [image["image"] for image in found] == [str(path) for path in photographs]
    classes = checkpoint.load(run / "last.pt")["classes"]
    assert any(image["detections"] for image in found)
    for image in found:
        with Image.open(image["image"]) as picture:
            assert Image.open(run / "found" / (Path(image["image"]).stem + ".jpg")).size == picture.size
            for thing in image["detections"]:
                x1, y1, x2, y2 = thing["box"]
                assert 0 <= x1 < x2 <= picture.width
                assert 0 <= y1 < y2 <= picture.height
                assert thing["label"] in classes
                assert 0.2 < thing["score"] <= 1


@pytest.mark.slow
def test_killed_in_mid_epoch_and_resumed(tmp_path):
    recipe = ("--epochs", 2, "--batch-size", 2, "--warmup", 2, "--save-every", 2, "--seed", 5)
    whole = command("train", SAMPLE, "--out", tmp_path / "whole", *SMALL, *recipe)
    assert whole.returncode == 0, whole.stderr
    process = command("train", SAMPLE, "--out", tmp_path / "parts", *SMALL, *recipe, start=True)
    last = tmp_path / "parts" / "last.pt"
    until = time.monotonic() + 120
    while not last.exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < checkpoint.load(last)["training"]["step"] < 12
    done = command("train", SAMPLE, "--out", tmp_path / "parts", *SMALL, *recipe, "--resume")
    assert done.returncode == 0, done.stderr
    one, two = (checkpoint.load(tmp_path / run / "last.pt")["model"] for run in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def _bad_checkpoint(path):
    checkpoint.save({"model": {"x": torch.ones(1)}, "architecture": {"name": "yolo"}, "classes": []}, path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("train", "none", "--out", "out"), "no data set none"),
        (("train", "CARDS", "--out", "out", "--split", "nobody"), "nobody"),
        (("train", "CARDS", "--out", "out", "--lr", "-1"), "lr must be a positive number, got -1"),
        (("train", "CARDS", "--out", "out", "--weights", "none.pt"), "none.pt"),
        (("train", "CARDS", "--out", "out", "--classes", "names"), "queen"),
        (("train", "CARDS", "--out", "out", "--weights", "vgg.pt"), "give it as --backbone-weights"),
        (("evaluate", "CARDS", "--weights", "none.pt"), "none.pt"),
        (("evaluate", "CARDS", "--weights", "text.pt"), "text.pt: corrupt"),
        (("evaluate", "CARDS", "--weights", "bare.pt"), "bare.pt does not tell its model and classes"),
        (("evaluate", "CARDS", "--weights", "yolo.pt"), "got 'yolo'"),
        (("evaluate", "CARDS", "--weights", "bare.pt", "--model", "ssd300_vgg16", "--num-classes", "7"), "bare.pt"),
        (("detect", "none.jpg", "--weights", "lite.pt"), "no image or folder at none.jpg"),
        (("detect", "empty", "--weights", "lite.pt"), "empty holds no images"),
        (("detect", "photos", "--weights", "lite.pt", "--out", "photos"), "would overwrite"),
        (("evaluate", "photos", "--weights", "lite.pt", "--zero-based"), "is for VOC folders, which photos is not"),
        (("detect", "photos", "text.pt", "--weights", "lite.pt", "--out", "out"), "text.pt cannot be read as an image"),
        (("export", "--weights", "none.pt", "--out", "out.onnx"), "none.pt"),
        (("export", "--weights", "lite.pt", "--out", "out.txt"), "must end in .onnx or .pt2, or --format be given"),
        (
            ("export", "--weights", "lite.pt", "--out", "out.pt2", "--size", "0", "9"),
            "size must be positive, got (0, 9)",
        ),
        (("export", "--weights", "lite.pt", "--out", "none/out.pt2"), "no folder none for --out none/out.pt2"),
        (("export", "--weights", "lite.pt", "--out", "x.so", "--format", "aotinductor"), "must end in .pt2, got x.so"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names").write_text("king\njack\n")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    shutil.copy(next((SAMPLE / "JPEGImages").iterdir()), tmp_path / "photos")
    checkpoint.save({"x": torch.ones(1)}, tmp_path / "bare.pt")
    _bad_checkpoint(tmp_path / "yolo.pt")
    model = ssdlite320_mobilenet_v2(3)
    state = {"model": model.state_dict(), "architecture": model.architecture, "classes": ["a", "b"]}
    checkpoint.save(state, tmp_path / "lite.pt")
    if "vgg.pt" in arguments:
        backbone = {k.removeprefix("backbone."): v for k, v in ssd300_vgg16(2).state_dict().items() if "features" in k}
        checkpoint.save(backbone, tmp_path / "vgg.pt")
    with pytest.raises(SystemExit) as ended:
        cli.main([str(SAMPLE) if a == "CARDS" else a for a in arguments])
    assert ended.value.code.startswith("ssd_ext: ")
    assert "\n" not in ended.value.code
    assert text in ended.value.code


def test_a_command_that_fails_says_so_to_the_shell(tmp_path):
    done = command("evaluate", SAMPLE, "--weights", tmp_path / "none.pt")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ssd_ext: ")
    assert "Traceback" not in done.stderr


def test_output_that_its_reader_has_closed_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "ssd_ext", "env"]
    done = subprocess.run(line, env=ENVIRONMENT | {"PYTHONUNBUFFERED": ""}, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_rules_of_data_reach_training_and_evaluation(tmp_path):
    """A folder with one wrong box, and corners that are to be taken as they stand."""
    folder = tmp_path / "cards"
    shutil.copytree(SAMPLE, folder)
    first = (folder / "ImageSets" / "Main" / "train.txt").read_text().split()[0]
    file = folder / "Annotations" / f"{first}.xml"
    text = file.read_text()
    file.write_text(re.sub(r"<xmax>\d+</xmax>", "<xmax>0</xmax>", text, count=1))
    expected = load_dataset(SAMPLE, "train")
    for name, *others in (("train", "--out", "x"), ("evaluate", "--weights", "x")):
        line = [name, str(folder), *others]
        args = cli.parser_for(name).parse_args([*line, "--zero-based", "--skip-invalid"])
        with pytest.warns(UserWarning, match=f"left out 1 of {len(expected.boxes)} boxes"):
            read = read_data(args.data, "train", None, args)
        assert torch.equal(read.target(1)["boxes"], expected.target(1)["boxes"] + torch.tensor([1, 1, 0, 0]))
        args = cli.parser_for(name).parse_args(line)
        with pytest.raises(ValueError, match=f"{first}.xml: object 1 of image"):
            read_data(args.data, "train", None, args)


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    names = [
        "frame9.jpg",
        "frame10.JPEG",
        "frame100.png",
        "frame101.bmp",
        "frame102.webp",
        "frame103.tif",
        "frame104.tiff",
    ]
    for name in (*reversed(names), "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in image_files([tmp_path])] == names


def test_pictures_have_names_of_their_own():
    files = [Path("x/a.jpg"), Path("y/a.png"), Path("z/a-2.jpg"), Path("x/a.jpg")]
    names = _distinct_names(files)
    assert len(set(names.values())) == len(names) == 3


def test_an_error_is_one_sentence_or_a_traceback(monkeypatch):
    def fails(error):
        def run(args):
            raise error

        monkeypatch.setattr("ssd_ext.cli.env.run", run)

    monkeypatch.delenv("SSD_EXT_TRACEBACK", raising=False)
    for error, text in (
        (ValueError("no such split"), "no such split"),
        (RuntimeError("CUDA out of memory"), "CUDA out of memory"),
        (KeyboardInterrupt(), "interrupted"),
    ):
        fails(error)
        with pytest.raises(SystemExit, match=f"^ssd_ext: {text}$"):
            cli.main(["env"])
    fails(AttributeError("a fault of ours"))
    with pytest.raises(AttributeError, match="a fault of ours"):
        cli.main(["env"])
    monkeypatch.setenv("SSD_EXT_TRACEBACK", "1")
    fails(ValueError("no such split"))
    with pytest.raises(ValueError, match="no such split"):
        cli.main(["env"])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "required: COMMAND"),
        (["env", "--threshold", "1"], "unrecognized arguments"),
        (["export", "--weights", "x", "--out", "y", "--format", "tflite"], "invalid choice: 'tflite'"),
    ],
)
def test_a_line_that_is_not_understood(line, text, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help(name, capsys):
    """Of each subcommand with its own arguments, and of all together."""
    for line in ([name, "--help"], ["--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(line)
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert cli.COMMANDS[name].split()[0] in told.lower().split()
        assert ("--weights" in told) == (line[0] in ("train", "evaluate", "detect", "export"))


def test_options_of_the_recipe():
    line = ["train", "data", "--out", "x", "--clip-grad-norm", "0.5", "--no-crop", "--milestones", "0.5", "0.9"]
    recipe = recipe_of(cli.parser_for("train").parse_args(line))
    assert (recipe.clip_grad_norm, recipe.crop, recipe.milestones) == (0.5, False, (0.5, 0.9))
    lite = recipe_of(cli.parser_for("train").parse_args([*line, *SMALL, "--lr", "0.5"]))
    assert (recipe.optimizer, lite.optimizer, lite.lr) == ("sgd", "adamw", 0.5)


def test_what_is_told_of_detections():
    boxes = torch.tensor([[1.04, 2, 30, 40], [5, 6, 7, 8], [9, 9, 20, 20]])
    found = {"boxes": boxes, "scores": torch.tensor([0.87654, 0.5, 0.25]), "labels": torch.tensor([2, 1, 3])}
    assert as_json(filter_by_score(found, 0.25), ["ace"]) == [
        {"label": 2, "score": 0.8765, "box": [1.0, 2.0, 30.0, 40.0]},
        {"label": "ace", "score": 0.5, "box": [5.0, 6.0, 7.0, 8.0]},
    ]
    image = torch.zeros(3, 60, 60, dtype=torch.uint8)
    assert torch.equal(draw(image, filter_by_score(found, 0.9), []), image)
    one, both = (draw(image, filter_by_score(found, threshold), ["ace", "ten", "six"]) for threshold in (0.6, 0.4))
    assert one[:, 2:41, 1:31].any() and not one[:, 42:].any()
    assert not torch.equal(one, both)


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    """A checkpoint of an untrained detector of two classes."""
    path = tmp_path_factory.mktemp("lite") / "lite.pt"
    model = ssdlite320_mobilenet_v2(3, image_size=(96, 128))
    checkpoint.save({"model": model.state_dict(), "architecture": model.architecture, "classes": ["a", "b"]}, path)
    return path


def onnx_metadata(path):
    return {entry.key: entry.value for entry in pytest.importorskip("onnx").load(path).metadata_props}


def torch_metadata(path):
    extra = {export.METADATA_FILE: ""}
    torch.export.load(path, extra_files=extra)
    return {name: json.dumps(value) for name, value in json.loads(extra[export.METADATA_FILE]).items()}


def aotinductor_metadata(path):
    return torch._inductor.aoti_load_package(path).get_metadata()


RESIZED = ("--size", "60", "80")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "file", "size", "metadata"),
    [
        (RESIZED, "detector.ONNX", [60, 80], onnx_metadata),
        ((), "detector.pt2", [96, 128], torch_metadata),
        (RESIZED, "detector.pt2", [60, 80], torch_metadata),
        (("--format", "aotinductor", *RESIZED), "detector.pt2", [60, 80], aotinductor_metadata),
    ],
    ids=["onnx", "torch", "torch, resized", "aotinductor"],
)
def test_export(lite, tmp_path, capsys, options, file, size, metadata):
    if metadata is onnx_metadata:
        pytest.importorskip("onnxscript")
    path = str(tmp_path / file)
    cli.main(["export", "--weights", str(lite), "--out", path, "--device", "cpu", *options])
    told = metadata(path)
    assert json.loads(told["classes"]) == ["a", "b"]
    assert json.loads(told["preprocessing"])["size"] == size
    assert f"images [B, 3, {size[0]}, {size[1]}], RGB in 0..1, to boxes, scores" in capsys.readouterr().out


@pytest.mark.slow
def test_trains_on_a_coco_file(tmp_path):
    pytest.importorskip("pycocotools")
    sample = load_dataset(SAMPLE, "test")
    images, annotations = [], []
    for i, path in enumerate(sample.paths):
        width, height = sample.sizes[i]
        images.append({"id": i, "file_name": path.name, "width": width, "height": height})
        target = sample.target(i)
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            thing = {"id": len(annotations) + 1, "image_id": i, "category_id": 10 * label, "iscrowd": 0}
            annotations.append(thing | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(sample.classes, 1)]
    shutil.copytree(SAMPLE / "JPEGImages", tmp_path / "images")
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    recipe = ("--epochs", 1, "--batch-size", 2, *SMALL)
    done = command("train", file, "--val-data", file, "--out", tmp_path / "run", *recipe)
    assert done.returncode == 0, done.stderr
    done = command("evaluate", file, "--weights", tmp_path / "run" / "last.pt", "--metrics", "coco")
    assert done.returncode == 0, done.stderr
    assert "AP50" in done.stdout


@pytest.mark.slow
def test_benchmark_of_models_runs(tmp_path):
    line = [sys.executable, ROOT / "benchmarks" / "model.py", "--models", "ssdlite320_mobilenet_v2", "--batch", "2"]
    line += ["--seconds", "0.1", "--json", tmp_path / "model.json"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "model.json").read_text())["results"]
    assert {row["what"] for row in rows} >= {"heads", "ops", "detect", "images", "step"}
    assert "share of the ops" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_benchmark_of_integrations_runs(model, tmp_path):
    line = [sys.executable, ROOT / "benchmarks" / "integrations.py", "--models", model, "--batch", "2"]
    line += ["--size", "96", "--candidates", "50", "--seconds", "0.1", "--json", tmp_path / "integrations.json"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "integrations.json").read_text())["results"]
    whats = {f"{what}, {who}" for what in ("whole", "replaced") for who in ("torchvision", "ssd_ext")}
    assert {(row["kind"], row["what"]) for row in rows} == {(k, w) for k in ("inference", "training") for w in whats}
    assert "times as fast" in done.stdout


def rename(values, names):
    return {names.get(key, key): value for key, value in values.items()}


@pytest.mark.parametrize("version", ["of this version", "0.1.0"])
def test_a_checkpoint_tells_its_model(tmp_path, version):
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3), "antialias": False}
    settings |= {"score_threshold": 0.02, "max_detections": 7}
    settings["loss"] = MultiBoxLoss(variances=(0.2, 0.3), neg_to_pos_ratio=2.0)
    model = ssdlite320_mobilenet_v2(3, image_size=(160, 224), **settings).eval()
    architecture = model.architecture
    if version == "0.1.0":
        loss = rename(architecture["loss"], {"neg_to_pos_ratio": "ratio"})
        architecture = rename(architecture, {"prior_spec": "priors"}) | {"loss": loss}
    state = {"model": model.state_dict(), "architecture": architecture, "classes": ["a", "b"]}
    checkpoint.save(state, tmp_path / "w.pt")
    loaded, classes = load_detector(tmp_path / "w.pt")
    assert classes == ["a", "b"]
    assert loaded.image_size == (160, 224)
    assert loaded.architecture == model.architecture
    image = torch.rand(3, 320, 450)  # made smaller, for which antialiasing matters
    with torch.inference_mode():
        (expected,), (found,) = model([image]), loaded([image])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(found["boxes"]) == 7
    with pytest.raises(ValueError, match="has 2 classes, but 1 names were given"):
        load_detector(tmp_path / "w.pt", classes=["a"])


def test_a_checkpoint_keeps_its_priors(tmp_path):
    """Of 0.1.0, which took any steps, and where these weights go to a model with other priors."""
    model, path, size = ssdlite320_mobilenet_v2(3, image_size=(160, 224)), tmp_path / "w.pt", {"image_size": (160, 224)}
    architecture = model.architecture
    spec = {key: value for key, value in architecture.pop("prior_spec").items() if key != "spread"}
    assert spec["feature_sizes"][2] == (3, 4)
    spec["steps"] = (16, 32, 107, 128, 160, 160)
    state = {"model": model.state_dict(), "architecture": architecture | {"priors": spec}, "classes": ["a", "b"]}
    checkpoint.save(state, path)
    with pytest.warns(UserWarning, match=r"level 2 has 3x4 cells of steps\[2\]=107 pixels.* It is kept here"):
        loaded, _ = load_detector(path)
    first = sum(loaded.prior_spec.counts()[:2])
    assert loaded.priors[first : first + 4 * 6 : 6, 0].tolist() == pytest.approx(
        [(i + 0.5) * 107 / 224 for i in range(4)]
    )
    with pytest.warns(UserWarning, match="It is kept here"):
        assert torch.equal(create(**loaded.architecture).priors, loaded.priors)
    with pytest.warns(
        UserWarning, match=r"w.pt: trained with other priors of an image of \(160, 224\) than the model's"
    ):
        ssdlite320_mobilenet_v2(3, weights=path, **size)
    with warnings.catch_warnings(action="error"):
        ssdlite320_mobilenet_v2(3, weights=path, image_size=(160, 160))
        checkpoint.save(state | {"architecture": model.architecture}, path)
        ssdlite320_mobilenet_v2(3, weights=path, **size)


def test_weights_alone(tmp_path):
    path, model = tmp_path / "w.pt", "ssdlite320_mobilenet_v2"
    checkpoint.save(ssdlite320_mobilenet_v2(3).state_dict(), path)
    (tmp_path / "names").write_text("king\n\njack \n")
    assert load_detector(path, model=model, classes=read_classes(tmp_path / "names"))[1] == ["king", "jack"]
    assert load_detector(path, model=model, num_classes=3)[1] == ["1", "2"]
    with pytest.raises(ValueError, match="is no whole detector with 7 classes"):
        load_detector(path, model=model, num_classes=7)
