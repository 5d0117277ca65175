"""Direct implementation of MEF, as in the authors' release: reference for the values and baseline for the speed.

Gains multiply the activations, matrix exponentials are computed per pixel and per call, tensors are NCHW, and nothing
is fused or cached. The functions take a ``Flow`` of the mef family and use its parameters.
"""

import torch
import torch.nn.functional as F

from flowaug.flows.bijections import ActNorm, InvertibleConv1x1, Squeeze


def scaled_conv(conv, x):
    return F.conv2d(x, conv.weight, padding=conv.padding) * conv.gain[:, None, None] + conv.bias[:, None, None]


def conditioner(net, x):
    h = scaled_conv(net.stem, x)
    for block in net.blocks:
        r = scaled_conv(block.conv1, F.elu(h))
        r = scaled_conv(block.conv2, F.elu(r))
        h = h + scaled_conv(block.conv3, F.elu(r))
    return scaled_conv(net.head, F.elu(h))


def bounded(module, raw):
    rescale = module.rescale.clamp(-0.75 * module.bound, 0.75 * module.bound)
    return rescale * torch.tanh(raw) + module.reshift.clamp(-0.25 * module.bound, 0.25 * module.bound)


def matrices(transform, raw):
    c = transform.channels
    s, t = raw.split([c * c, c], dim=1)
    return bounded(transform.matrix, s).unflatten(1, (c, c)).permute(0, 3, 4, 1, 2), t


def coupling(layer, x, inverse):
    c = x.shape[1]
    x1, x2 = x.split([c - c // 2, c // 2], dim=1)
    raw = conditioner(layer.conditioner, x1)
    if hasattr(layer.transform, "matrix"):
        s, t = matrices(layer.transform, raw)
        ladj = s.diagonal(dim1=-2, dim2=-1).sum((1, 2, 3))
        e = torch.matrix_exp((-s if inverse else s).contiguous())
        x2 = x2 - t if inverse else x2
        y = (e @ x2.permute(0, 2, 3, 1)[..., None])[..., 0].permute(0, 3, 1, 2)
        y = y if inverse else y + t
    else:
        s, t = raw.chunk(2, dim=1)
        s = bounded(layer.transform.log_scale, s)
        ladj = s.sum((1, 2, 3))
        y = (x2 - t) * torch.exp(-s) if inverse else torch.exp(s) * x2 + t
    return torch.cat([x1, y], dim=1), ladj


def step_forward(layer, x):
    if isinstance(layer, Squeeze):
        return F.pixel_unshuffle(x, 2).contiguous(), 0
    if isinstance(layer, ActNorm):
        return (x - layer.shift) * torch.exp(layer.log_scale), layer.log_scale.sum()
    if isinstance(layer, InvertibleConv1x1):
        w = torch.matrix_exp(layer.log_weight)
        return F.conv2d(x, w[:, :, None, None]), layer.log_weight.trace() * x.shape[2] * x.shape[3]
    return coupling(layer, x, inverse=False)


def step_inverse(layer, z):
    if isinstance(layer, Squeeze):
        return F.pixel_shuffle(z, 2).contiguous()
    if isinstance(layer, ActNorm):
        return z / torch.exp(layer.log_scale) + layer.shift
    if isinstance(layer, InvertibleConv1x1):
        return F.conv2d(z, torch.matrix_exp(-layer.log_weight)[:, :, None, None])
    return coupling(layer, z, inverse=True)[0]


def encode(flow, x):
    """Encode images (B, C, H, W); returns latents (B, D) and ``ladj`` (B,)."""
    outs, total = [], x.new_zeros(len(x))
    for level, shape in zip(flow.bijection.levels, flow.bijection.out_shapes, strict=True):
        for layer in level.bijections:
            x, ladj = step_forward(layer, x)
            total = total + ladj
        x, out = x.split([x.shape[1] - shape[0], shape[0]], dim=1)
        outs.append(out.flatten(1))
    return torch.cat(outs, dim=1), total


def decode(flow, z):
    """Decode latents (B, D) to images (B, C, H, W)."""
    shapes = flow.bijection.out_shapes
    outs = [p.unflatten(1, s) for p, s in zip(z.split([c * h * w for c, h, w in shapes], 1), shapes, strict=True)]
    x = outs.pop()
    for i in reversed(range(len(shapes))):
        for layer in reversed(flow.bijection.levels[i].bijections):
            x = step_inverse(layer, x)
        x = torch.cat([x, outs.pop()], dim=1) if outs else x
    return x
