"""In which order the cores of a convolution meet its input."""

import dataclasses

from tensorlayers import CP, TT, LowRank, Tucker, convolution
from tensorlayers.conv_maps import Window
from tensorlayers.network import Axis
from tests.conv.support import VARIANTS


class TestPlan:
    """The order of the convolutions."""

    AXES = (Axis("out", 64), Axis("in", 32), Axis("kernel", 3), Axis("kernel", 3))

    def plan(self, format, stride=(1, 1), positions=4096, axes=AXES, kernel=(3, 3), transposed=False):
        return convolution.conv_plan(format.resolve(axes)[0], kernel, stride, (), transposed, positions)

    def test_tucker_is_1x1_kxk_1x1(self):
        steps = self.plan(Tucker((16, 8))).steps
        assert [step.kernel for step in steps] == [(), ("k1", "k2"), ()]
        assert [step.groups for step in steps] == [(), (), ()]
        assert self.plan(Tucker((16, 8))).macs == 4096 * (32 * 8 + 8 * 16 * 9 + 16 * 64)

    def test_cp_is_1x1_depthwise_1x1_with_the_spatial_factors_merged_where_that_is_cheaper(self):
        for size, kernels in (
            (2, [(), ("k1", "k2"), ()]),
            (3, [(), ("k1", "k2"), ()]),
            (5, [(), ("k1",), ("k2",), ()]),
            (9, [(), ("k1",), ("k2",), ()]),
        ):
            axes = (Axis("out", 256), Axis("in", 256), Axis("kernel", size), Axis("kernel", size))
            steps = self.plan(CP(64), axes=axes, kernel=(size, size)).steps
            assert [step.kernel for step in steps] == kernels
            assert [step.groups for step in steps] == [(), *[("r",)] * (len(steps) - 2), ()]

    def test_tt_is_a_pipeline(self):
        wide = (*self.AXES[:2], Axis("kernel", 9), Axis("kernel", 9))
        steps = self.plan(TT((4, 4, 4)), axes=wide, kernel=(9, 9)).steps
        assert [step.kernel for step in steps] == [(), ("k1",), ("k2",), ()]
        assert all(not step.groups and not step.lead for step in steps)

    def test_low_rank_spatial_is_kx1_1xk(self):
        steps = self.plan(LowRank(16, split="spatial")).steps
        assert [step.kernel for step in steps] == [("k1",), ("k2",)]

    def test_the_dense_kernel_is_built_where_that_is_cheaper(self):
        assert len(self.plan(CP(300)).steps) < 4
        wide = (Axis("out", 256), Axis("in", 256), *self.AXES[2:])
        steps = self.plan(Tucker((256, 256)), axes=wide, positions=65536).steps
        assert len(steps) == 1
        assert steps[0].group.cores == (0, 1, 2)

    def test_a_stride_is_taken_as_early_as_it_can(self):
        one, two = (self.plan(LowRank(16, split="spatial"), stride) for stride in [(1, 1), (2, 2)])
        assert one.macs == 4096 * (32 * 16 * 3 + 16 * 64 * 3)
        assert two.macs == 2048 * 32 * 16 * 3 + 1024 * 16 * 64 * 3

    def test_transposed_steps_grow_late(self):
        plan = self.plan(Tucker((4, 8)), stride=(2, 2), transposed=True)
        assert plan.macs == 4096 * (32 * 8 + 8 * 4 * 9) + 4 * 4096 * 4 * 64

    def test_many_cores_are_reduced_first(self):
        axes = (Axis("out", 64), Axis("in", 64), Axis("kernel", 3))
        network = Tucker(2, in_modes=(2,) * 6, out_modes=(2,) * 6).resolve(axes)[0]
        assert len(network.cores) == 13
        plan = convolution.conv_plan(network, (3,), (1,), (), False, 256)
        assert sorted(core for step in plan.steps for core in step.group.cores) == list(range(13))

    def test_no_more_macs_than_dense_and_than_the_chain(self):
        for format in VARIANTS:
            plan = self.plan(dataclasses.replace(format, rank=0.2))
            assert plan.macs <= 1.05 * 4096 * 64 * 32 * 9

    def test_a_window_without_padding_or_stride_is_plain(self):
        window = Window((1, 1, 3), (1, 2, 2), ((0, 0), (0, 0), (1, 1)), (1, 1, 1))
        assert window.plain == (1,)
