"""Comparing tensors: errors in proportion to the tensor's size, as single elements may be sums that cancel."""


def assert_rms_close(actual, expected, tolerance, names=None):
    """RMS of the difference <= tolerance * RMS of what is expected, tensor by tensor."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        if not e.numel():
            continue
        error = (a.float() - e.float()).square().mean().sqrt()
        scale = e.float().square().mean().sqrt() + 1e-6
        assert error / scale <= tolerance, f"{names[i] if names else i}: RMS ratio {error / scale:.2e}"


def gradients_of(model, logits):
    """The gradients of all parameters, for the sum of the squared logits of all rows."""
    model.zero_grad()
    sum(rows.square().sum() for rows in logits).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]
