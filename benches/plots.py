"""Draws plots as SVG: bars, and lines over a logarithmic axis."""

import html
import math

COLORS = ("#2a6fbb", "#7fb2e5", "#c0504d", "#e0a09e", "#888888")
FRAME = '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{}" font-family="sans-serif" font-size="12">'


def text(x, y, what, anchor="start"):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(what)}</text>'


def write(path, height, parts):
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join([FRAME.format(height), '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n")


def bars(path, title, values):
    most = max(values.values()) or 1
    parts = [text(10, 20, title)]
    for i, (name, value) in enumerate(values.items()):
        y, width = 34 + 26 * i, value / most * 340
        parts.append(text(190, y + 14, name, "end"))
        parts.append(f'<rect x="200" y="{y}" width="{width:.0f}" height="20" fill="{COLORS[i % len(COLORS)]}"/>')
        parts.append(text(206 + width, y + 14, f"{value:,.0f}"))
    write(path, 44 + 26 * len(values), parts)


def lines(path, title, steps, values):
    most = (max(max(line) for line in values.values()) or 1) * 1.1
    low, high = math.log(steps[0]), math.log(steps[-1])

    def place(step, value):
        return 60 + (math.log(step) - low) / (high - low) * 540, 260 - value / most * 210

    parts = [text(10, 20, title), '<path d="M60 50V260H600" fill="none" stroke="black"/>']
    for step in steps:
        parts.append(text(place(step, 0)[0], 276, f"{step:,}", "middle"))
    for part in (0.25, 0.5, 0.75, 1):
        value = most / 1.1 * part
        parts.append(text(55, place(steps[0], value)[1] + 4, f"{value:,.0f}", "end"))
    for i, (name, line) in enumerate(values.items()):
        color = COLORS[i % len(COLORS)]
        points = " ".join("{:.0f},{:.0f}".format(*place(step, value)) for step, value in zip(steps, line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<rect x="{70 + 180 * i}" y="286" width="12" height="12" fill="{color}"/>')
        parts.append(text(88 + 180 * i, 296, name))
    write(path, 310, parts)
