"""Use what a run of Mine with its default width has trained: python reload.py runs/mine."""

import sys

import torch
from net import SmallNet


def bare_torch(run):
    """best.pth is the state_dict of the net: neither Lightning nor lit_basics is needed."""
    net = SmallNet()
    net.load_state_dict(torch.load(f"{run}/best.pth"))
    return net.eval()


def lightning(run):
    """best.ckpt holds the arguments of Mine, and the state of the optimizer as well."""
    from mine import Mine

    return Mine.load_from_checkpoint(f"{run}/checkpoints/best.ckpt", map_location="cpu").eval()


if __name__ == "__main__":
    run = sys.argv[1]
    images = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        logits = bare_torch(run)(images)
        assert "lightning" not in sys.modules
        assert torch.equal(lightning(run)(images), logits)
    print("classes:", logits.argmax(1).tolist())
