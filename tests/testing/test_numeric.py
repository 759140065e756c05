"""The tolerance rule and the exact inputs. Tier: no device."""

import pytest
import torch

from tp_kernels.testing.numeric import assert_close_to_reference, integers, max_error


def test_twice_pytorchs_error_is_the_bound():
    reference = torch.tensor([1.0, 2.0, 100.0], dtype=torch.float64)
    pytorch = torch.tensor([1.0, 2.5, 100.0])
    assert_close_to_reference(torch.tensor([1.0, 3.0, 100.0]), pytorch, reference)
    with pytest.raises(AssertionError, match=r"weights .*error 1\.100e\+00 exceeds 1\.000e\+00.*at \(1,\)") as caught:
        assert_close_to_reference(torch.tensor([1.0, 3.1, 100.0]), pytorch, reference, name="weights")
    assert "1 of 3 elements" in str(caught.value)


def test_floor_is_one_ulp_when_pytorch_is_exact():
    reference = torch.tensor([1.0, 64.0])
    pytorch = reference.bfloat16()
    ulp = torch.finfo(torch.bfloat16).eps * 64
    assert_close_to_reference(torch.tensor([1.0, 64.0 + ulp]).bfloat16(), pytorch, reference)
    with pytest.raises(AssertionError):
        assert_close_to_reference(torch.tensor([1.0, 64.0 + 2 * ulp]).bfloat16(), pytorch, reference)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_results_fail_unless_expected(bad):
    reference = torch.tensor([1.0, 2.0])
    with pytest.raises(AssertionError):
        assert_close_to_reference(torch.tensor([1.0, bad]), reference, reference)
    expected = torch.tensor([1.0, bad])
    assert_close_to_reference(expected, expected, expected)
    with pytest.raises(AssertionError):
        assert_close_to_reference(reference, expected, expected)


def test_wrong_inputs_are_value_errors():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="shapes"):
        assert_close_to_reference(torch.zeros(3), x, x)
    with pytest.raises(ValueError, match=r"in torch\.bfloat16"):
        assert_close_to_reference(x.bfloat16(), x, x)
    with pytest.raises(ValueError, match="float32 or float64"):
        assert_close_to_reference(x.bfloat16(), x.bfloat16(), x.bfloat16())
    assert_close_to_reference(torch.zeros(0), torch.zeros(0), torch.zeros(0))


def test_integers_repeat_and_stay_in_range():
    x = integers((100, 7), torch.bfloat16, low=-3, high=2, seed=4)
    assert x.dtype == torch.bfloat16 and x.shape == (100, 7)
    assert sorted(set(x.flatten().tolist())) == [-3, -2, -1, 0, 1, 2]
    assert torch.equal(x, integers((100, 7), torch.bfloat16, low=-3, high=2, seed=4))
    assert not torch.equal(x, integers((100, 7), torch.bfloat16, low=-3, high=2, seed=5))
    assert max_error(x, x) == 0.0
    with pytest.raises(ValueError, match="low <= high"):
        integers(3, low=2, high=1)
