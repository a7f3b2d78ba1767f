"""Closed-form weights, inputs and index lists for golden-value files (format "golden-case/1").

A golden-case file is one JSON document: configuration, ordered list of tensor names and
shapes, rules for every weight, input and index list, and the numbers a reference
implementation produced with them.  This module turns the rules into tensors.  It needs only
numpy and torch and knows nothing about any model.

    case   = load("cross_scale_mae_a.json")
    names  = runs(case)                          # e.g. ["pre_norm", "post_norm"]
    cfg    = config(case, run)                   # merged configuration of one run
    state  = state_dict(case, run)               # OrderedDict name -> tensor, file order
    inputs = input_tensors(case, run)            # dict name -> tensor
    idx    = index_lists(case, run)              # dict name -> int64 tensor
    gold   = case["runs"][run]["golden"]         # the numbers to reach

    python fill.py FILE.json [...]               # self-check of the tensors against the file

Layout of a file
    config, tensors, inputs, indices  hold for every run; a run may override them: "config",
    "inputs" and "indices" entry by entry, "tensors" row by row (same name replaces, new name is
    appended).  A row of "tensors" is [name, shape, kind, key]:
      kind "fill"    value from the rule in recipe.weights, key = string or number fed to it
      kind "table"   fixed sin-cos position table, key = {"grid", "extent", "cls_row"}
      kind "const"   every element equals key
    "reference_tensors" of a run, where present, lists the names of another implementation:
    [name, shape, source name, part] with part = null (whole tensor), or 0, 1, 2 for the first,
    second or third of three equal blocks of rows of the source.

All fills are in C order (last index fastest); j is the flat index, n the number of elements.
"""

import json
import sys
import zlib
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F

FORMAT = "golden-case/1"


# ------------------------------------------------------------------ reading a file
def load(path):
    with open(path, encoding="utf-8") as handle:
        case = json.load(handle)
    if case.get("format") != FORMAT:
        raise ValueError(f"{path}: format {case.get('format')!r}, expected {FORMAT!r}")
    return case


def runs(case):
    return list(case["runs"])


def _merged(case, run, part):
    out = dict(case.get(part, {}))
    if run is not None:
        out.update(case["runs"][run].get(part, {}))
    return out


def config(case, run=None):
    return _merged(case, run, "config")


def tensor_rows(case, run=None):
    rows = OrderedDict((r[0], r) for r in case["tensors"])
    if run is not None:
        for r in case["runs"][run].get("tensors", []):
            rows[r[0]] = r
    return list(rows.values())


# ------------------------------------------------------------------ element rules
def weyl(n, number, alpha, beta, gamma):
    """u[j] = 2 frac(j*j*alpha + j*beta + (number+1)*gamma) - 1, float64, in [-1, 1).

    Only multiplication, addition and remainder: bit-reproducible."""
    j = np.arange(n, dtype=np.float64)
    f = j * j * alpha + j * beta + (number + 1) * gamma
    return 2.0 * np.mod(f, 1.0) - 1.0


def crc(text):
    """CRC-32 (zlib polynomial) of the UTF-8 bytes."""
    return zlib.crc32(text.encode("utf-8"))


def _fill(rule, name, shape, key):
    n = int(np.prod(shape))
    kind = rule["rule"]
    last = name.rsplit(".", 1)[-1]
    one_dim = len(shape) == 1
    if kind == "crc_sine":
        # s[j] = sin(freq*j + chirp*j*j + (crc32(key) mod modulus) + offset)
        j = np.arange(n, dtype=np.float64)
        s = np.sin(rule["freq"] * j + rule["chirp"] * j * j + (crc(key) % rule["modulus"]) + rule["offset"])
        if one_dim:
            v = rule["vector_gain"] * s + (1.0 if last == "weight" else 0.0)
        else:
            v = rule["matrix_gain"] * s / np.sqrt(float(np.prod(shape[1:])))
    elif kind == "weyl":
        u = weyl(n, key, rule["alpha"], rule["beta"], rule["gamma"])
        if last == "weight" and one_dim:
            v = 1.0 + rule["scale_gain"] * u
        elif last == "bias":
            v = rule["bias_gain"] * u
        elif last == "weight":
            v = np.sqrt(3.0 * shape[0] / n) * u
        else:  # position tables and tokens
            v = rule["table_gain"] * u
    elif kind == "crc_normal":
        v = np.random.RandomState(crc(key)).standard_normal(n) * rule["scale"]
        v = v.astype(np.float32)
        if one_dim and last == "weight":
            v = v + np.float32(1.0)
    else:
        raise ValueError(f"unknown weight rule {kind!r}")
    v = np.asarray(v).reshape(shape)
    if rule["round_to_float32"]:
        v = v.astype(np.float32)
    return torch.from_numpy(v.astype(np.float64))


def sincos_table(dim, grid, extent, cls_row):
    """Fixed 2-D sin-cos position table, (grid*grid [+1], dim), rounded to float32.

    Coordinates 0..extent in `grid` equal steps on both axes; token (row, col) has number
    row*grid+col.  With q = dim/4 and w[m] = 10000**(-m/q), m = 0..q-1, the channels are
    sin(col*w), cos(col*w), sin(row*w), cos(row*w): the column coordinate comes first.
    cls_row puts a row of zeros in front."""
    q = dim // 4
    w = 1.0 / 10000.0 ** (np.arange(q, dtype=np.float64) / q)
    pos = np.linspace(0.0, float(extent), grid)
    row, col = np.repeat(pos, grid)[:, None] * w, np.tile(pos, grid)[:, None] * w
    t = np.concatenate([np.sin(col), np.cos(col), np.sin(row), np.cos(row)], axis=1)
    if cls_row:
        t = np.concatenate([np.zeros((1, dim)), t])
    return torch.from_numpy(t.astype(np.float32).astype(np.float64))


# ------------------------------------------------------------------ weights
def state_dict(case, run=None, dtype=torch.float64, reference_names=False):
    out = OrderedDict()
    for name, shape, kind, key in tensor_rows(case, run):
        if kind == "fill":
            v = _fill(case["recipe"]["weights"], name, shape, key)
        elif kind == "table":
            v = sincos_table(shape[-1], key["grid"], key["extent"], key["cls_row"]).reshape(shape)
        elif kind == "const":
            v = torch.full(shape, float(key), dtype=torch.float64)
        else:
            raise ValueError(f"{name}: unknown kind {kind!r}")
        out[name] = v.to(dtype)
    if reference_names and run is not None and "reference_tensors" in case["runs"][run]:
        return OrderedDict(
            (new, out[src] if part is None else out[src].chunk(3, 0)[part])
            for new, _, src, part in case["runs"][run]["reference_tensors"]
        )
    return out


# ------------------------------------------------------------------ inputs
def _wave(spec):
    b, c, y, x = np.meshgrid(*[np.arange(s, dtype=np.float64) for s in spec["shape"]], indexing="ij")
    p = spec["params"]
    return np.sin(p["kx"] * x + p["ky"] * y + p["kc"] * c + p["kb"] * b) + p["amp"] * np.cos(
        p["kxy"] * x * y / (1.0 + c) + p["kb2"] * b
    )


def _input(spec, done):
    kind = spec["rule"]
    if kind == "wave":
        v = _wave(spec)
    elif kind == "weyl_unit":
        n = int(np.prod(spec["shape"]))
        v = 0.5 * (weyl(n, spec["number"], spec["alpha"], spec["beta"], spec["gamma"]) + 1.0)
    elif kind == "crc_normal":
        rng = np.random.RandomState(crc(spec["key"]))
        v = (rng.standard_normal(int(np.prod(spec["shape"]))) * spec["scale"]).astype(np.float32).astype(np.float64)
    elif kind == "modular_noise":
        n, k = spec["shape"]
        b, t = np.arange(n)[:, None], np.arange(k)[None, :]
        v = ((spec["per_token"] * t + spec["per_sample"] * b + spec["shift"]) % spec["modulus"]) / spec["modulus"]
    elif kind == "fraction_noise":
        j = np.arange(int(np.prod(spec["shape"])), dtype=np.float64)
        v = np.mod((j + spec["shift"]) * spec["multiplier"], 1.0)
    elif kind == "resized_crop":
        top, left, height, width = spec["rectangle"]
        cut = done[spec["source"]][:, :, top : top + height, left : left + width]
        return F.interpolate(cut, size=tuple(spec["shape"][2:]), mode="bilinear", align_corners=False, antialias=True)
    else:
        raise ValueError(f"unknown input rule {kind!r}")
    return torch.from_numpy(np.ascontiguousarray(np.asarray(v, dtype=np.float64).reshape(spec["shape"])))


def input_tensors(case, run=None, dtype=torch.float64):
    done = {}
    for name, spec in _merged(case, run, "inputs").items():
        done[name] = _input(spec, done)  # float64; sources stand before what they feed
        if list(done[name].shape) != list(spec["shape"]):
            raise ValueError(f"{name}: shape {list(done[name].shape)}, file says {spec['shape']}")
    return {k: v.to(dtype) for k, v in done.items()}


# ------------------------------------------------------------------ index lists
def children(index, grid, ratio):
    """Tokens of a (ratio*grid)-wide grid that cover each token of a grid-wide grid.

    Token m = (row, col) gives (row*ratio+a)*(grid*ratio) + col*ratio+b for a, b in 0..ratio-1,
    a outer, b inner; the order of the parents is kept."""
    row, col, off = index // grid, index % grid, torch.arange(ratio)
    r = (row[..., None, None] * ratio + off[:, None]) * (grid * ratio)
    c = col[..., None, None] * ratio + off[None, :]
    return (r + c).flatten(-3)


def _derive(spec, inputs, done):
    kind = spec["rule"]
    if kind == "argsort":  # ascending order of the noise row, first `count`
        return inputs[spec["noise"]].argsort(1)[:, : spec["count"]]
    if kind == "permutation":  # one legacy generator per sample
        return torch.from_numpy(
            np.stack(
                [np.random.RandomState(spec["seed"] + b).permutation(spec["length"]) for b in range(spec["batch"])]
            )
        )
    if kind == "slice":  # part of another list
        return done[spec["source"]][:, spec["start"] : spec["stop"]]
    if kind == "children":
        return children(done[spec["source"]], spec["grid"], spec["ratio"])
    return None  # "given": the list in the file is the definition


def index_lists(case, run=None):
    inputs = input_tensors(case, run)
    done = {}
    for name, spec in _merged(case, run, "indices").items():
        made = _derive(spec, inputs, done)
        if "values" in spec:
            value = torch.tensor(spec["values"], dtype=torch.int64)
            if made is not None and not torch.equal(made.long(), value):
                raise ValueError(f"{name}: rule {spec['rule']!r} does not give the list in the file")
        elif made is not None:
            value = made.long()
        else:
            raise ValueError(f"{name}: no values and no rule that makes them")
        if "first" in spec and value.flatten()[: len(spec["first"])].tolist() != spec["first"]:
            raise ValueError(f"{name}: first entries differ from the file")
        done[name] = value
    return done


# ------------------------------------------------------------------ self-check
def summary(t):
    t = t.detach().double()
    return {
        "shape": list(t.shape),
        "sum": float(t.sum()),
        "l2": float(t.norm()),
        "first4": [float(v) for v in t.flatten()[:4]],
    }


def fill_summary(case, run):
    """Numbers that tell whether the fills were built as intended, without any model."""
    state = [
        v for row, v in zip(tensor_rows(case, run), state_dict(case, run).values(), strict=True) if row[2] == "fill"
    ]
    flat = torch.cat([v.flatten() for v in state])
    return {
        "filled_tensors": len(state),
        "filled_elements": flat.numel(),
        "sum": float(flat.sum()),
        "l2": float(flat.norm()),
        "inputs": {k: {"sum": float(v.sum()), "l2": float(v.norm())} for k, v in input_tensors(case, run).items()},
    }


def _near(a, b, tol):
    if isinstance(a, dict):
        return set(a) == set(b) and all(_near(a[k], b[k], tol) for k in a)
    return abs(a - b) <= tol * max(1.0, abs(b))


def self_check(case, tol=1e-9):
    """Raises if weights, inputs or index lists differ from what the file records."""
    for run in runs(case):
        got, want = fill_summary(case, run), case["runs"][run]["fill_check"]
        if not _near(got, want, tol):
            raise AssertionError(f"{case['method']}/{case['case']}/{run}: got {got}, file says {want}")
        index_lists(case, run)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        c = load(path)
        self_check(c)
        print(
            f"{path}: {c['method']}/{c['case']}: {len(runs(c))} runs, "
            f"{len(c['tensors'])} tensors, fills and index lists agree with the file"
        )
