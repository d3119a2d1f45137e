"""An operation goes straight to its launch, but through the operator where something has to see it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from uso_kernels import operation as module
from uso_kernels.launch import Config, Generation, Launch
from uso_kernels.operation import OPERATIONS, CallSite, Operation, operation

ROUTES: list[str] = []


def doubled_for_a_test(x: Tensor, out: Tensor) -> None:
    ROUTES.append("operator")
    out.copy_(2 * x)


class _Kernel:
    """Stands where a compiled kernel does: `kernel[grid](**arguments)`."""

    def __getitem__(self, grid: tuple[int, ...]) -> "_Kernel":
        return self

    def __call__(self, **arguments: object) -> None:
        ROUTES.append("launch")
        x, out = arguments["x_ptr"], arguments["out_ptr"]
        assert isinstance(x, Tensor) and isinstance(out, Tensor)
        # As a kernel writes: past autograd and its version counters.
        out.untyped_storage().copy_((2 * x).untyped_storage())


def launch(generation: Generation, x: Tensor, out: Tensor) -> Launch:
    return Launch("doubled", _Kernel(), (1,), {"x_ptr": x, "out_ptr": out}, Config(1, 1, {}))


@pytest.fixture(scope="module")
def doubled() -> Iterator[Operation]:
    made = operation(writes=("out",), launch=launch)(doubled_for_a_test)
    yield made
    del OPERATIONS[made.name]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors in the part of a GPU's."""
    monkeypatch.setattr(module, "NATIVE_DEVICE", "cpu")
    monkeypatch.setattr(module, "generation_of", lambda x: "hopper")


def routes_of(doubled: Operation, x: Tensor) -> list[str]:
    ROUTES.clear()
    out = torch.zeros(3)
    doubled(x, out)
    if not isinstance(x, torch._subclasses.FakeTensor):
        assert torch.equal(out, 2 * x.detach())
    return list(ROUTES)


def test_on_a_cpu_it_is_the_reference(doubled: Operation) -> None:
    assert routes_of(doubled, torch.ones(3)) == ["operator"]


@pytest.mark.usefixtures("on_a_gpu")
def test_plain_tensors_go_straight_to_the_launch(doubled: Operation) -> None:
    assert routes_of(doubled, torch.ones(3)) == ["launch"]
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        assert routes_of(doubled, parameter) == ["launch"]
    with torch.inference_mode():
        assert routes_of(doubled, torch.ones(3)) == ["launch"]
    assert routes_of(doubled, parameter.requires_grad_(False)) == ["launch"]


class Watching(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.found.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("on_a_gpu")
def test_whatever_has_to_see_the_operator_does(doubled: Operation) -> None:
    assert routes_of(doubled, torch.ones(3, requires_grad=True)) == ["operator"]
    with Watching() as mode:
        doubled(torch.ones(3), torch.zeros(3))
    assert "doubled_for_a_test" in mode.found
    with FakeTensorMode() as fakes:
        ROUTES.clear()
        doubled(torch.ones(3), torch.zeros(3))
    assert ROUTES == []
    ROUTES.clear()
    doubled(fakes.from_tensor(torch.ones(3)), fakes.from_tensor(torch.zeros(3)))
    assert ROUTES == []


@pytest.mark.usefixtures("on_a_gpu")
def test_a_compiler_sees_the_operator(doubled: Operation) -> None:
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    @torch.compile(backend=keep, fullgraph=True)
    def step(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        doubled(x, out)
        return out + 1

    assert torch.equal(step(torch.ones(3)), torch.full((3,), 3.0))
    assert any("doubled_for_a_test" in target for target in seen)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_backward_pass_learns_that_what_it_kept_was_written(doubled: Operation) -> None:
    out, weight = torch.zeros(3), torch.ones(3, requires_grad=True)
    product = (weight * out).sum()
    doubled(torch.ones(3), out)
    assert ROUTES[-1] == "launch"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_library_stands_in_for_a_launch(doubled: Operation) -> None:
    def tripled_for_a_test(x: Tensor, out: Tensor) -> None:
        out.copy_(3 * x)

    made = operation(writes=("out",), library=tripled_for_a_test)(tripled_for_a_test)
    del OPERATIONS[made.name]
    with pytest.raises(TypeError, match="tripled_for_a_test is computed by a library"):
        made.launch("hopper", torch.ones(3), torch.zeros(3))
    assert doubled.launch("hopper", torch.ones(3), torch.zeros(3)).name == "doubled"
    with pytest.raises(ValueError, match="either a launch or a library"):
        operation(writes=("out",))
    with pytest.raises(ValueError, match="either a launch or a library"):
        operation(writes=("out",), launch=launch, library=tripled_for_a_test)


class _Compiled:
    """Stands where a compiled kernel does: `compiled[grid](*arguments)`, and counts."""

    def __init__(self) -> None:
        self.arguments: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid == (1, 1, 1)

        def runner(*arguments: object) -> None:
            self.arguments.append(arguments)
            x, out, offset = arguments[0], arguments[1], arguments[2]
            assert isinstance(x, Tensor) and isinstance(out, Tensor) and isinstance(offset, float)
            out.copy_(x + offset)

        return runner


class _Jitted:
    """Stands where a kernel does whose launch compiles it."""

    arg_names = ("x_ptr", "out_ptr", "offset", "BLOCK")

    def __call__(self) -> None:
        raise AssertionError("launched without a grid")

    def __init__(self, compiled: _Compiled) -> None:
        self.compiled, self.launched = compiled, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., _Compiled]:
        def run(*, x_ptr: Tensor, out_ptr: Tensor, offset: float, **options: object) -> _Compiled:
            self.launched += 1
            out_ptr.copy_(x_ptr + offset)
            return self.compiled

        return run


@contextmanager
def shifting(kernel: _Jitted, checked: list[int]) -> Iterator[Operation]:
    """An operation that adds a number by a kernel; its check notes the lengths that it sees."""

    def shifted_for_a_test(x: Tensor, out: Tensor, offset: float) -> None:
        out.copy_(x + offset)

    def describe(generation: Generation, x: Tensor, out: Tensor, offset: float) -> Launch:
        return Launch("shifted", kernel, (1,), {"x_ptr": x, "out_ptr": out, "offset": offset}, Config(1, 1, {"BLOCK": 8}))

    def check(x: Tensor, out: Tensor, offset: float) -> None:
        checked.append(len(x))

    made = operation(writes=("out",), launch=describe, check=check)(shifted_for_a_test)
    try:
        yield made
    finally:
        del OPERATIONS[made.name]


@pytest.mark.usefixtures("on_a_gpu")
def test_a_call_site_hands_over_addresses_and_looks_no_more() -> None:
    """The first call is an ordinary one; later ones are launches by address, but for operands that are not aligned."""
    compiled = _CompiledForAddresses()
    kernel = _Jitted(compiled)  # type: ignore[arg-type]
    seen: list[int] = []

    with shifting(kernel, seen) as moved:
        site, base = CallSite(moved), torch.arange(64.0)
        for _ in range(3):
            x, out = base[:8].clone(), torch.zeros(8)
            compiled.tensors = {tensor.data_ptr(): tensor for tensor in (x, out)}
            site(x, out, 2.0)
            assert torch.equal(out, x + 2.0)
        assert (seen, kernel.launched, compiled.calls) == ([8], 1, 2)
        out = torch.zeros(8)
        site(base[1:9], out, 2.0)
        assert torch.equal(out, base[1:9] + 2.0)
        assert (seen, kernel.launched, compiled.calls) == ([8, 8], 2, 2)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_call_site_looks_where_operands_are_on_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prepared launch goes to the current GPU's stream: operands of another one's are an ordinary call each time."""
    kernel = _Jitted(compiled := _Compiled())
    monkeypatch.setattr(module, "current_device", lambda: 1)
    with shifting(kernel, []) as lifted:
        site, x = CallSite(lifted), torch.arange(8.0)
        for turn in range(3):
            site(x, out := torch.zeros(8), 2.0)
            assert torch.equal(out, x + 2.0)
            assert (kernel.launched, compiled.arguments) == (turn + 1, [])


def test_a_call_site_on_a_cpu_is_the_operation(doubled: Operation) -> None:
    site, x = CallSite(doubled), torch.ones(3)
    for turn in range(3):
        ROUTES.clear()
        out = torch.zeros(3)
        site(x * turn, out)
        assert torch.equal(out, 2 * x * turn)
        assert ROUTES == ["operator"]


class _CompiledForAddresses:
    """As `_Compiled`, called with addresses."""

    def __init__(self) -> None:
        self.calls, self.tensors = 0, dict[int, Tensor]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def runner(x: object, out: object, offset: object, block: object) -> None:
            assert isinstance(x, int) and isinstance(out, int) and isinstance(offset, float) and block == 8
            self.calls += 1
            self.tensors[out].copy_(self.tensors[x] + offset)

        return runner


@pytest.mark.usefixtures("on_a_gpu")
def test_a_launch_is_prepared_once_for_operands_of_a_kind() -> None:
    """Other shapes, strides, types, alignments and numbers are launches of their own; other addresses are not."""
    checked: list[int] = []
    kernel = _Jitted(_Compiled())
    with shifting(kernel, checked) as shifted:
        base = torch.arange(64.0)
        first = base[:8]
        kinds = [(first, 1.0), (first, 2.0), (base[:12], 1.0), (base[:16:2], 1.0), (base[1:9], 1.0), (first.int(), 1.0)]
        for seen, (x, offset) in enumerate(kinds):
            for again in range(3):
                out = torch.zeros(len(x))
                version = out._version
                shifted(x.clone() if x.is_contiguous() and x.data_ptr() % 16 == 0 else x, out, offset)
                assert torch.equal(out, x + offset)
                assert out._version > version
                assert (kernel.launched, len(checked)) == (seen + 1, seen + 1)
                assert len(kernel.compiled.arguments) == 2 * seen + again
        assert kernel.compiled.arguments[-1][3] == 8
        assert all(argument is None for prepared in shifted.prepared.values() for argument in prepared.template[:2])
        with Watching() as watching:
            shifted(base[:8], torch.zeros(8), 1.0)
        assert (len(checked), watching.found != []) == (len(kinds) + 1, True)
