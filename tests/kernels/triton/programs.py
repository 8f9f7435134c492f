"""A script: numbers of which a program is made anew, as "kernel name", and kernels whose program another length does not have."""

from dataclasses import replace

from benchmarks.kernel_resources import Shape, launches

SHAPES = [Shape(1, 128, 1, 64), Shape(2, 64, 4, 64)]

for shape in SHAPES:
    first, *rest = (dict(launches(replace(shape, tokens=tokens))) for tokens in (128, 192, 1024, 201, 1001))
    for name, launch in first.items():
        for parameter, kind in zip(launch.kernel.params, launch.types, strict=True):
            if kind in ("i32", "fp32") and not parameter.do_not_specialize:
                print(launch.name, parameter.name)
        if any(other[name] != launch for other in rest):
            print(f"other: {name}")
