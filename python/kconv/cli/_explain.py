"""``kconv explain``: which algorithm runs each layer of a model, and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

import kconv
from kconv import models
from kconv._explain import DIRECTIONS, DTYPES, LAYOUTS, explain, layers


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("explain", help="which algorithm runs each layer, and why")
    parser.description = (
        "For each convolution and interleave of a model, by itself: the algorithms that may "
        "compute it, what each is expected to cost in multiply-adds of vectors, and the choice (*)."
    )
    parser.set_defaults(run=_explain)
    parser.add_argument("--model", required=True, metavar="NAME", help="a model of `kconv models`")
    parser.add_argument("--ktype", metavar="NAME", help="such as D6_16ch or D6v3_32ch")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="(default: 224)")
    parser.add_argument("--images", type=int, default=32, metavar="N", help="(default: 32)")
    parser.add_argument("--layout", choices=LAYOUTS, default="NCHW", help="(default: NCHW)")
    parser.add_argument("--direction", choices=DIRECTIONS, default="forward")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON, for other programs")


def _explain(options: argparse.Namespace) -> int:
    size = (options.image_size, options.image_size, 3)
    ktype = {"ktype": options.ktype} if options.ktype is not None else {}
    spec = models.create(options.model, input_shape=size, classes=10, **ktype)
    found = [
        (name, explain(direction=options.direction, dtype=options.dtype, **arguments))
        for name, arguments in layers(spec.graph(), options.images, options.layout)
        if (arguments["operation"], options.direction) != ("interleave", "grad_weight")
    ]
    if options.json:
        print(json.dumps([{"layer": name, **one.as_dict()} for name, one in found], indent=1))
        return 0
    print(f"{spec.name}, {kconv.build_info()['isa']}; cost: multiply-adds of vectors, *: chosen")
    for name, one in found:
        print(f"\n{name}\n{one}")
    return 0
