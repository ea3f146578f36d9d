"""Draws the pictures of these pages: ``python docs/draw.py [FOLDER]``, by default beside itself."""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

STYLE = """
  .paper { fill: #ffffff }
  text { font: 14px system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 12px }
  .kept { fill: #0969da; fill-opacity: 0.25; stroke: #0969da }
  .passing { fill: none; stroke: #9a6700; stroke-dasharray: 4 3 }
  .done { fill: #1a7f37; fill-opacity: 0.25; stroke: #1a7f37 }
  .line { stroke: #1f2328; fill: none }
  .head { fill: #1f2328 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 }
    text { fill: #e6edf3 }
    .kept { fill: #4493f8; stroke: #4493f8 }
    .passing { stroke: #d29922 }
    .done { fill: #3fb950; stroke: #3fb950 }
    .line { stroke: #e6edf3 }
    .head { fill: #e6edf3 }
  }
"""
UNIT, HEIGHT, TOP, GAP, LEFT = 24, 30, 80, 26, 100
INPUT, GROWTH, LAYERS = 4, 2, 4


class Drawing:
    """Shapes and words, top down, in an SVG."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{width}" height="{height}" rx="6"/>',
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="head" d="M0 0 8 4 0 8z"/></marker>',
        ]

    def box(self, kind: str, x: float, y: float, width: float, height: float = HEIGHT) -> None:
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>')

    def text(self, x: float, y: float, words: str, anchor: str = "start", small: bool = False) -> None:
        small_class = ' class="small"' if small else ""
        self.parts.append(f'<text{small_class} x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " ".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path class="line" d="M{path}" marker-end="url(#head)"/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def columns(drawing: Drawing, y: float, made: int, label: str) -> None:
    """F's first columns, drawn feature group by feature group, up to what layer ``made`` added."""
    drawing.text(LEFT - 14, y + 20, label, "end")
    drawing.box("kept", LEFT, y, INPUT * UNIT)
    drawing.text(LEFT + INPUT * UNIT / 2, y + 20, "x", "middle")
    for i in range(made):
        drawing.box("kept", LEFT + (INPUT + i * GROWTH) * UNIT, y, GROWTH * UNIT)
        drawing.text(LEFT + (INPUT + (i + 0.5) * GROWTH) * UNIT, y + 20, f"Y{i + 1}", "middle")


def dense_block() -> str:
    """A block of four layers: what each layer reads, writes and keeps."""
    row = 2 * HEIGHT + GAP + 20
    width, height = LEFT + (INPUT + LAYERS * GROWTH) * UNIT + 210, TOP + LAYERS * row + 30
    drawing = Drawing(width, height, "A dense block: every layer reads the first columns of one matrix in place.")
    drawing.text(14, 24, "F, one buffer for the whole block: a row per pixel, a column per channel")
    drawing.box("kept", 14, 38, 18, 14)
    drawing.text(40, 50, "kept for the backward pass (Z: unless memory_efficient)", small=True)
    drawing.box("passing", 400, 38, 18, 14)
    drawing.text(426, 50, "in registers or cache alone", small=True)
    for i in range(LAYERS):
        y = TOP + i * row
        columns(drawing, y, i, f"layer {i + 1}")
        reads = (INPUT + i * GROWTH) * UNIT
        middle, below = LEFT + reads / 2, y + HEIGHT + GAP
        drawing.box("passing", LEFT, below, reads)
        drawing.text(middle, below + 20, "relu(bn(F))", "middle", small=True)
        drawing.arrow((middle, y + HEIGHT), (middle, below - 2))
        z = LEFT + reads + 50
        drawing.arrow((LEFT + reads, below + 15), (z - 2, below + 15))
        drawing.text(LEFT + reads + 24, below + 8, "W1", "middle", small=True)
        drawing.box("kept", z, below, 2 * UNIT)
        drawing.text(z + UNIT, below + 20, f"Z{i + 1}", "middle")
        target = LEFT + reads + GROWTH * UNIT / 2
        drawing.box("kept", LEFT + reads, y, GROWTH * UNIT)
        drawing.text(target, y + 20, f"Y{i + 1}", "middle")
        corner = z + 2 * UNIT + 24
        start = (z + 2 * UNIT, below + 15)
        drawing.arrow(start, (corner, below + 15), (corner, y + 15), (LEFT + reads + GROWTH * UNIT + 2, y + 15))
        drawing.text(corner + 8, y + 40, "3x3 of relu(bn(Z)),", small=True)
        drawing.text(corner + 8, y + 56, "written in place", small=True)
    return drawing.svg()


def backward_pass() -> str:
    """The same block's backward pass: what each layer completes, passes on and adds to."""
    row = 3 * HEIGHT + 2 * GAP + 10
    width, height = LEFT + (INPUT + LAYERS * GROWTH) * UNIT + 210, TOP + LAYERS * row + 20
    drawing = Drawing(width, height, "The backward pass: a column is completed once, when all its readers are done.")
    drawing.text(14, 24, "G, one buffer of F's form: the gradient with respect to each column; layers in reverse")
    for x, kind, words in (
        (14, "kept", "still collects"),
        (150, "done", "completed by (1)"),
        (300, "passing", "used at once, not kept"),
    ):
        drawing.box(kind, x, 38, 18, 14)
        drawing.text(x + 26, 50, words, small=True)
    for i in reversed(range(LAYERS)):
        y = TOP + (LAYERS - 1 - i) * row
        reads = (INPUT + i * GROWTH) * UNIT
        vectors, below = y + HEIGHT + 4, y + 2 * HEIGHT + GAP
        drawing.text(LEFT - 14, y + 20, f"layer {i + 1}", "end")
        drawing.text(LEFT - 14, vectors + 12, "P, Q", "end", small=True)
        drawing.box("kept", LEFT, vectors, reads, 6)
        drawing.box("kept", LEFT, vectors + 9, reads, 6)
        drawing.box("kept", LEFT, y, INPUT * UNIT)
        drawing.text(LEFT + INPUT * UNIT / 2, y + 20, "x", "middle")
        for j in range(LAYERS):
            x = LEFT + (INPUT + j * GROWTH) * UNIT
            drawing.box("kept" if j < i else "done", x, y, GROWTH * UNIT)
            drawing.text(x + GROWTH * UNIT / 2, y + 20, f"{'dY' if j == i else 'Y'}{j + 1}", "middle")
        source, z = LEFT + reads + GROWTH * UNIT / 2, LEFT + reads + 60
        drawing.box("passing", z, below, 2 * UNIT)
        drawing.text(z + UNIT, below + 20, f"dZ{i + 1}", "middle")
        drawing.arrow((source, y + HEIGHT), (source, below - 12), (z + UNIT, below - 12), (z + UNIT, below - 2))
        drawing.text(z + UNIT + 10, below - 12, "3x3 backward, bn2", small=True)
        drawing.box("passing", LEFT, below, reads)
        drawing.text(LEFT + reads / 2, below + 20, "D", "middle")
        drawing.arrow((z, below + 15), (LEFT + reads + 2, below + 15))
        drawing.text(LEFT + reads + 30, below + 9, "W1", "middle", small=True)
        drawing.arrow((LEFT + reads / 2, below), (LEFT + reads / 2, vectors + 17))
        drawing.text(LEFT + reads / 2 + 8, below - 8, "(2)", small=True)
    return drawing.svg()


def main(folder: Path) -> None:
    (folder / "dense-block.svg").write_text(dense_block())
    (folder / "backward-pass.svg").write_text(backward_pass())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
