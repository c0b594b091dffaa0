import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sess_lightning.evaluation.weights import read_state


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def truncated(path):
    torch.save(nn.Linear(3, 2).state_dict(), path)
    cut(path)


def truncated_pickle(path):
    torch.save(nn.Linear(3, 2).state_dict(), path, _use_new_zipfile_serialization=False)
    cut(path)


def torchscript(path):
    torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3)).save(path)


DAMAGED = {
    "cut.pt": (truncated, r"is truncated or damaged \(.*\); copy or download it again\.$"),
    "old.pth": (truncated_pickle, r"is truncated or damaged \(.*\); copy or download it again\.$"),
    "byte.pth": (lambda path: path.write_bytes(b"\x80"), r"is truncated or damaged"),
    "empty.pt": (lambda path: path.touch(), r"is empty; download or save it again\.$"),
    "empty.safetensors": (lambda path: path.touch(), r"is empty; download or save it again\.$"),
    "pointer.pt": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"contains text, 'version https://git-lfs.*download the file itself\.$",
    ),
    "page.safetensors": (lambda path: path.write_text("<html>404</html>"), r"contains text, '<html>404"),
    "script.pt": (torchscript, r"is a TorchScript archive; save model\.state_dict\(\) instead\.$"),
    "whole.pt": (lambda path: torch.save(nn.Linear(3, 2), path), r"contains more than tensors"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("name", DAMAGED)
def test_files_without_weights_are_refused_in_one_line_that_says_what_they_are(name, tmp_path):
    write, says = DAMAGED[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=says) as caught:
        read_state(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_safetensors_that_were_cut_short_are_refused(tmp_path):
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "a.safetensors")
    cut(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: is truncated or damaged"):
        read_state(tmp_path / "a.safetensors")
