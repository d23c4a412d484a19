"""Pages of made-up reports, and what a browser makes of them; `report_fixtures` opens them."""

import re

from report_samples import sample_report

from peft_moe.report.page import write_page

KINDS = {
    "molora": {"method": "MoLoRA", "blocks": 3},
    "moelora": {"method": "MOELoRA", "blocks": 2},
    "at-moe": {"method": "AT-MoE", "blocks": 5},
    "med-moe": {"method": "Med-MoE-LoRA", "blocks": 30, "modules": ["q_proj", "mlp.up_proj"]},
    "one layer, 64 experts, no task": {"blocks": 1, "modules": ["mlp"], "experts": 64, "tasks": ()},
}
HOSTILE = [
    "</script><img src=x onerror=ran=1><script>ran=1</script>",
    '"><svg onload=ran=1>',
    "<!--<script>",
    "\u202e]]>gnirts\u2066",
    "שלום عليكم",
    "👩‍⚕️🧬 {{script}}",
    "__proto__",
    "constructor",
    "line\u2028and\u2029paragraph",
    "&lt;b&gt; \\u003c",
    "long" * 2500,
]


def written(path, *, samples=None, change=None, **options):
    """The page of a made-up report, with its dict and samples."""
    routing, made = sample_report(**options)
    if change:
        change(routing)
    samples = made if samples is None else samples
    write_page(routing, samples, path)
    return routing, samples


def percent(value):
    return f"{100 * float(f'{value:.5g}'):.1f}%"


def cell(page, box, row, column, table=0):
    """A cell by its row and column without labels."""
    return page.locator(f"#{box} table").nth(table).locator("tbody tr").nth(row).locator("td").nth(column)


def tip(page):
    """What the tooltip says, as its head and a dict."""
    assert page.locator("#tip").is_visible()
    names, values = (page.locator(f"#tip {tag}").all_text_contents() for tag in ("dt", "dd"))
    return page.locator("#tip strong").text_content(), dict(zip(names, values, strict=True))


def tips(page, cells):
    """What the tooltip says of each of many cells, in one go: its head and a dict."""
    found = cells.evaluate_all("""all => all.map(cell => {
        cell.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
        const words = tag => [...document.querySelectorAll(`#tip ${tag}`)].map(e => e.textContent);
        return [words("strong")[0], words("dt"), words("dd")];
    })""")
    return [(head, dict(zip(names, values, strict=True))) for head, names, values in found]


def choose(page, field, label):
    page.select_option(f"#{field}", label=label)


def layer_named(routing, name):
    return next(layer for layer in routing["layers"] if layer["name"] == name)


def numbers_in(colour):
    """The components of a CSS colour; an alpha of 1 is left out by browsers."""
    return [float(part) for part in re.findall(r"[\d.]+", colour)]


def luminance(colour):
    """Of an opaque CSS colour, by WCAG 2."""
    parts = [part / 255 for part in numbers_in(colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(k * x for k, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
