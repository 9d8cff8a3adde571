"""Texts and controls of a page that are too faint to read, by the ratios of WCAG 2 AA."""

from __future__ import annotations

from typing import Any

# In the page: every visible text and placeholder against the grounds under it (4.5, or 3 where it is large), and the
# edge or the ground of every control against what is around it (3).
_FAULTS = r"""
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = (c) => {
    const [r, g, b] = c.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const ratio = (a, b) => Math.max(light(a), light(b)) / Math.min(light(a), light(b));
  const under = (element) => {
    let [ground, opacity] = [[255, 255, 255, 1], 1];
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.unshift(e);
    for (const e of chain) {
      const style = getComputedStyle(e);
      opacity *= Number(style.opacity);
      ground = over(rgba(style.backgroundColor), ground);
    }
    return [ground, opacity];
  };
  const found = [];
  const state = (e) => (e.matches(":disabled") ? " disabled" : "");
  const name = (e) => `${e.tagName.toLowerCase()}.${e.getAttribute("class") ?? ""}${state(e)}`;
  const read = (e, style, text) => {
    const [ground, opacity] = under(e);
    const ink = rgba(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
    ink[3] *= opacity * (style === getComputedStyle(e) ? 1 : Number(style.opacity));
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 600) ? 3 : 4.5;
    const got = ratio(over(ink, ground), ground);
    if (got < least) found.push(`${name(e)} "${text.trim().slice(0, 20)}" ${got.toFixed(2)}`);
  };
  const shown = (e) => e.getBoundingClientRect().width > 1 && !e.closest(".hidden, .skip, title");
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const [text, e] = [texts.currentNode.textContent, texts.currentNode.parentElement];
    if (text.trim() && shown(e)) read(e, getComputedStyle(e), text);
  }
  for (const e of document.querySelectorAll("input, textarea, select, button, .button")) {
    if (e.placeholder && !e.value) read(e, getComputedStyle(e, "::placeholder"), e.placeholder);
    const style = getComputedStyle(e);
    const edge = rgba(style.borderTopColor);
    if (!shown(e) || parseFloat(style.borderTopWidth) === 0 || edge[3] === 0) continue;
    const [around] = under(e.parentElement);
    const got = Math.max(ratio(over(edge, around), around), ratio(under(e)[0], around));
    if (got < 3) found.push(`${name(e)} edge ${got.toFixed(2)}`);
  }
  return [...new Set(found)];
}
"""


def faint_now(page: Any) -> list[str]:
    """What is too faint on an opened page in the colours that it has."""
    return list(page.evaluate(_FAULTS))


def faint(page: Any) -> list[str]:
    """What is too faint on an opened page, in the light and in the dark colours."""
    found: list[str] = []
    before = page.evaluate("document.documentElement.dataset.theme ?? null")
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        found += [f"{theme}: {fault}" for fault in faint_now(page)]
    if before is None:
        page.evaluate("delete document.documentElement.dataset.theme")
    return found
