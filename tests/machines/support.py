"""A machine whose constants are known, and a clock that runs by them."""

from torch.utils._python_dispatch import TorchDispatchMode

from tensorlayers.machine import (
    Machine,
)

KNOWN = Machine(
    name="cpu",
    threads=1,
    flops={"float32": 9e10, "float64": 4e10, "bfloat16": 3e11, "float16": 1e9},
    half={"m": 0.5, "k": 3.0, "n": 20.0},
    memory=6e9,
    cached=3e10,
    permuted=1e10,
    cache=7 * 10**6,
    launch=3e-6,
    function=6e-5,
    conv={"rate": 2e11, "launch": 5e-5},
)
"""What the clock of these tests runs by; float16 is so slow that it is only probed."""


class Clock(TorchDispatchMode):
    """Advances by what each operation of torch takes by the known constants, and mostly spares doing it."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def __call__(self):
        return self.now

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.now += self.product(*args[:2])
            return kwargs["out"] if kwargs else function(*args)
        if name == "clone" and args[0].nbytes > 10**6:
            self.now += KNOWN.launch + 2 * args[0].nbytes / (
                KNOWN.memory if args[0].is_contiguous() else KNOWN.permuted
            )
            return args[0]
        return function(*args, **kwargs or {})

    @staticmethod
    def product(a, b):
        batch, (m, k), n = a.shape[:-2].numel(), a.shape[-2:], b.shape[-1]
        parts = [batch * size * a.itemsize for size in (m * k, k * n, m * n)]
        rate = KNOWN.cached if max(parts) <= KNOWN.cache else KNOWN.memory
        return KNOWN.launch + KNOWN.product(batch, m, k, n, str(a.dtype).removeprefix("torch.")) + sum(parts) / rate
