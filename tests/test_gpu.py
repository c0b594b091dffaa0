"""What only a CUDA device can show; ``make test-gpu``. Nothing is downloaded."""

import copy
import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18, vit_b_16

from every_method import ON_DEVICE, made
from formula import TARGET_LAYERS, build, picture
from sess_lightning import SESS, GradCAM, SESSCallback, SESSMetric
from sess_lightning.callback.gallery import Exhibit
from sess_lightning.cost.measuring import peak_bytes
from sess_lightning.introspection.lending import explaining
from sess_lightning.methods import CentreGaussian, GroupCAM, GuidedBackprop, IntegratedGradients, RandomMap
from sess_lightning.metrics.functional import deletion_curve, insertion_curve, pointing_hits, relevance_mass
from sess_lightning.ops import wait_for
from sess_lightning.types import Batch, SESSWarning

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz") if not path.stem.startswith("causal"))

METHODS = [
    GradCAM("layer4"),
    GuidedBackprop(),
    GroupCAM(4, "layer4"),
    SESS(GradCAM("layer4"), num_scales=3, prefilter_ratio=0.5, batch_size=8),
    SESS(GradCAM("layer4"), num_scales=3, coarse_to_fine=0.5, batch_size=8),
    SESS(GuidedBackprop(), num_scales=2, prefilter_ratio=0.5, batch_size=8),
    IntegratedGradients(steps=4),
]
method_cases = pytest.mark.parametrize("method", METHODS, ids=str)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # The first product of a process, if a thread of autograd asks for it.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]


@pytest.fixture
def given():
    torch.manual_seed(0)
    model = resnet18(num_classes=5).eval()
    images = torch.stack([picture(64, 90, 1), picture(64, 90, 2)])
    targets = torch.tensor([0, 1])
    there = copy.deepcopy(model).cuda(), images.cuda(), targets.cuda()
    return (model, images, targets), there


@pytest.fixture
def waiting_is_an_error():
    def start():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Its first call says that it is a prototype.
            torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["float32", "TF32"])
def tf32(request):
    """Whether products and convolutions round to TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if request.param == "TF32" else "highest")
    torch.backends.cudnn.allow_tf32 = request.param == "TF32"
    yield request.param == "TF32"
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@method_cases
def test_a_gpu_gives_the_maps_of_a_cpu(method, given, tf32):
    here, there = given
    maps, expected = method(*there).cpu(), method(*here)
    if tf32:
        # Integrated gradients sum magnitudes over pixels: TF32's rounding has no sign to cancel by.
        least = 0.99 if isinstance(method, IntegratedGradients) else 0.999
        pairs = zip(maps.flatten(1), expected.flatten(1), strict=True)
        assert min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs) > least
    else:
        torch.testing.assert_close(maps, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("_asis")])
@pytest.mark.parametrize("tf32", ["float32"], indirect=True)
def test_the_map_is_the_authors_on_a_gpu_too(case, tf32):
    golden = np.load(GOLDEN / f"{case}.npz")
    meta = json.loads(str(golden["meta"]))
    layer = TARGET_LAYERS[meta["model"]]
    bases = {"gradcam": GradCAM(layer), "groupcam": GroupCAM(target_layer=layer), "guided": GuidedBackprop()}
    method = SESS(
        bases[meta["method"]], meta["n"], meta["r"], window=224, stride=meta["step"],
        antialias=meta["antialias"], theta=meta["theta"], fusion=meta["pool"],
    )  # fmt: skip
    model = copy.deepcopy(build(meta["model"])).cuda()
    image, target = picture(meta["h"], meta["w"], meta["stream"])[None].cuda(), torch.tensor([meta["cls"]])
    with explaining(model):
        fused, _, _ = method.fused(model, image, target.cuda(), method.plan(model, (meta["h"], meta["w"])))
    step, expected = meta["subsample"], golden["drop_map" if "drop_map" in golden else "raw_map"]
    assert (np.abs(fused[0].cpu().numpy()[::step, ::step] - expected) > 1e-4).mean() <= 1e-3


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_a_gpu_plays_the_pointing_game_as_a_cpu_does(kind):
    maps = torch.rand(3, 64, 90, generator=torch.Generator().manual_seed(0))
    boxes = [
        torch.tensor([[5.0, 5, 40, 30]]),
        torch.zeros(0, 4),
        torch.tensor([[0.0, 0, 9, 9], [50, 9, 80, 50]]),
    ]
    masks = torch.zeros(3, 64, 90, dtype=torch.bool)
    masks[::2, 10:40, 20:60] = True
    here = boxes if kind == "boxes" else masks
    there = [each.cuda() for each in boxes] if kind == "boxes" else masks.cuda()
    assert torch.equal(pointing_hits(maps, here), pointing_hits(maps.cuda(), there).cpu())
    expected = relevance_mass(maps, here)
    torch.testing.assert_close(relevance_mass(maps.cuda(), there).cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("kind", ["none", "boxes", "masks"])
def test_no_update_of_the_metric_waits_for_the_device(kind, given, waiting_is_an_error):
    _, (model, images, targets) = given
    masks = torch.ones(2, 64, 90, dtype=torch.bool, device="cuda")
    boxes = [torch.tensor([[1.0, 1, 30, 30]], device="cuda")] * 2
    regions = {"none": None, "boxes": boxes, "masks": masks}[kind]
    compare = {"base": GradCAM("layer4"), "random": RandomMap(), "centre": CentreGaussian()}
    method = SESS(GradCAM("layer4"), num_scales=2)
    metric = SESSMetric(method, compare=compare, limits={"random": 1, "centre": 1}, grid=16).cuda()
    metric.update(model, images, targets, regions, numbers=[0, 1])
    waiting_is_an_error()
    metric.update(model, images, targets, regions, numbers=[2, 3])


@method_cases
def test_nothing_waits_for_the_device(method, given, waiting_is_an_error):
    _, there = given
    method(*there)  # What follows from the size alone is sent there once.
    waiting_is_an_error()
    method(*there)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_no_method_waits_for_the_device_once_it_knows_the_model(name, given, waiting_is_an_error):
    _, there = given
    method = made(name)
    method(*there)
    waiting_is_an_error()
    method(*there)


@pytest.mark.parametrize("curve", [insertion_curve, deletion_curve])
def test_no_curve_waits_for_the_device(curve, given, waiting_is_an_error):
    _, (model, images, targets) = given
    maps = torch.rand(2, 64, 90, device="cuda")
    waiting_is_an_error()
    curve(model, images, maps, targets, steps=4, batch_size=4)


def test_a_panels_maps_are_whole_once_their_device_has_been_waited_for():
    maps = torch.rand(512, 512, device="cuda")
    for _ in range(3):
        sent = Exhibit(Batch(torch.zeros(1, 3, 2, 2), torch.tensor([0])), {"SESS": maps * 2}, maps[0]).sent()
        wait_for("cuda")
        assert sent.maps["SESS"].is_pinned()
        assert torch.equal(sent.maps["SESS"], maps.cpu() * 2)


def test_a_batch_is_whole_once_it_is_back_on_the_host():
    images = torch.rand(64, 3, 512, 512)
    for _ in range(3):
        back = Batch(images.cuda() * 2, torch.zeros(64, dtype=torch.long)).to("cpu")
        assert torch.equal(back.images, images * 2)


@pytest.mark.parametrize("method", METHODS[:4], ids=str)
def test_two_runs_give_one_map(method, given):
    _, there = given
    torch.testing.assert_close(method(*there), method(*there), atol=1e-5, rtol=0)


def test_a_vit_whose_head_is_zeros_has_flat_maps_under_deterministic_algorithms():
    model = vit_b_16(image_size=32).cuda().eval()
    torch.use_deterministic_algorithms(True)
    try:
        maps = GradCAM()(model, torch.rand(1, 3, 32, 32, device="cuda"), torch.tensor([0], device="cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not maps.any()


class Recurrent(torch.nn.Module):
    """Reads features row by row; cuDNN refuses gradients of a recurrent layer in eval mode."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ReLU())
        self.lstm = torch.nn.LSTM(8, 8, batch_first=True, dropout=0.5, num_layers=2)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, images):
        rows = self.features(images).mean(3).mT
        return self.head(self.lstm(rows)[0][:, -1])


def test_a_recurrent_head_is_differentiated():
    torch.manual_seed(0)
    model = Recurrent().cuda().eval()
    images, targets = torch.rand(2, 3, 32, 32, device="cuda"), torch.tensor([0, 1], device="cuda")
    maps = GradCAM("features")(model, images, targets)
    assert maps.isfinite().all()
    assert torch.equal(maps, GradCAM("features")(model, images, targets))


def test_memory_that_runs_out_halves_the_batch():
    model = resnet18(num_classes=5).cuda().eval()
    images, targets = torch.rand(1, 3, 224, 224, device="cuda"), torch.tensor([0], device="cuda")
    expected = SESS(GradCAM("layer4"), num_scales=12, batch_size=8)(model, images, targets)
    small = SESS(GradCAM("layer4"), num_scales=12, batch_size=16)
    need = peak_bytes(lambda: small(model, images, targets), torch.device("cuda"))
    torch.cuda.empty_cache()
    held, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.5 * need + 2**26) / total)
    try:
        with pytest.warns(SESSWarning, match="Out of memory"):
            got = SESS(GradCAM("layer4"), num_scales=12, batch_size=512)(model, images, targets)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (got - expected).abs().mean() < 1e-3  # cuDNN may take TF32 and other kernels for other batches.
    assert torch.cuda.memory_allocated() - held < 2**20


def test_peak_memory_does_not_rise_with_the_number_of_windows():
    model = resnet18(num_classes=5).cuda().eval()
    images, targets = torch.rand(1, 3, 224, 224, device="cuda"), torch.tensor([0], device="cuda")
    peaks = []
    for scales in (6, 12):
        method = SESS(GradCAM("layer4"), num_scales=scales, batch_size=32)
        method(model, images, targets)
        peaks.append(peak_bytes(lambda method=method: method(model, images, targets), torch.device("cuda")))
    assert peaks[1] < 1.3 * peaks[0]


FLAGS = {
    "the new switch": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "the old switch": "torch.backends.cuda.matmul.allow_tf32 = True",
    "set_float32_matmul_precision": "torch.set_float32_matmul_precision('high')",
}


@pytest.mark.parametrize("setting", FLAGS.values(), ids=FLAGS)
def test_tf32_by_any_switch_is_left_as_it_was(setting):
    code = f"""
import torch
from torchvision.models import resnet18
from sess_lightning import GradCAM
net, image, target = resnet18().eval().cuda(), torch.rand(1, 3, 64, 64).cuda(), torch.tensor([0]).cuda()
{setting}
backends = torch.backends
places = (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.mkldnn.matmul)
flags = lambda: [getattr(place, 'fp32_precision', None) for place in places]
before = flags()
GradCAM('layer4')(net, image, target)
assert flags() == before, (before, flags())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class Classifier(pl.LightningModule):
    def __init__(self, kind):
        super().__init__()
        net = resnet18(num_classes=4)
        if kind == "channels last":
            net = net.to(memory_format=torch.channels_last)
        self.net, self.drop = torch.compile(net) if kind == "compiled" else net, torch.nn.Dropout(0.1)
        self.losses = []

    def forward(self, images):
        return self.net(self.drop(images))

    def training_step(self, batch, _):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, _):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


def trained(folder, precision, kind, callbacks):
    """Return a print of all that a training ends with, and the score that was logged."""
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.rand(32, 3, 64, 64), torch.arange(32) % 4)
    module = Classifier(kind)
    trainer = pl.Trainer(
        accelerator="gpu", devices=1, precision=precision, max_epochs=2, deterministic=kind != "benchmark",
        benchmark=kind == "benchmark", logger=False, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    try:
        trainer.fit(module, DataLoader(data, 8, shuffle=True), DataLoader(data, 8))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    held = [*module.state_dict().values(), *module.losses, torch.get_rng_state(), torch.cuda.get_rng_state()]
    held += [
        value for optimizer in trainer.optimizers for state in optimizer.state.values()
        for value in state.values() if isinstance(value, torch.Tensor)
    ]  # fmt: skip
    raw = (one.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for one in held)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    state = (hashlib.sha1(b"".join(raw)).hexdigest(), scaler and scaler.state_dict())
    return state, trainer.callback_metrics.get("sess/overall")


SETUPS = [
    ("32-true", "plain"), ("32-true", "channels last"), ("32-true", "compiled"), ("32-true", "benchmark"),
    ("bf16-mixed", "plain"), ("16-mixed", "plain"), ("16-mixed", "channels last"), ("16-true", "plain"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("precision", "kind"), SETUPS)
def test_a_training_is_the_same_with_and_without_the_callback(precision, kind, tmp_path, tf32, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if tf32 and not (precision == "32-true" and kind == "plain"):
        pytest.skip("TF32 is for float32")
    without = trained(tmp_path, precision, kind, [])[0]
    if trained(tmp_path, precision, kind, [])[0] != without:
        pytest.skip("this training differs from itself")
    callback = SESSCallback(SESS(GradCAM(), num_scales=2), num_samples=4, on_error="raise")
    state, overall = trained(tmp_path, precision, kind, [callback])
    assert state == without
    assert overall is not None
