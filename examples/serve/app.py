"""A classifier over HTTP: images in, labels and probabilities out.

KCONV_RUN=path/to/run uvicorn app:app --port 8000
curl -F image=@cat.jpg localhost:8000/predict?top=3
"""

from __future__ import annotations

import os
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, UploadFile

import kconv

MOST_BYTES = 2**24

net = kconv.load(os.environ["KCONV_RUN"])
app = FastAPI(title=f"kconv: {net.config.name}")


@app.get("/health")
def health() -> dict[str, object]:
    """Tell what is served, and that it is."""
    return {"network": net.config.name, "classes": net.class_names, "kconv": kconv.__version__}


# Not async: so each request has a thread, and the network computes without the interpreter's lock.
@app.post("/predict")
def predict(image: UploadFile, top: Annotated[int, Query(ge=1)] = 1) -> list[dict[str, object]]:
    """Classify an image of any of the usual formats."""
    data = image.file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise HTTPException(413, f"the image has more than {MOST_BYTES:,} bytes")
    try:
        pixels = net.read_image(data)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
    ranked = net.ranked(net(pixels[None])[0], top)
    return [{"label": label, "probability": probability} for label, probability in ranked]
