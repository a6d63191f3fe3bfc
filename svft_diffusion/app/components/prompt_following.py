"""Prompts of other tabs that are Generate's until something else is written there."""

from __future__ import annotations

import gradio as gr

# A script, so that nothing is sent. What was taken over is kept by field, to tell it from what the visitor has written.
# Adapters that the prompt names are left out: the other tabs have their own ways to choose some.
_FOLLOW = """(own) => {
  const taken = (window.svftPromptsTaken ??= {});
  if (own?.trim() && own !== taken.FIELD) return own;
  const theirs = document.querySelector("#prompt textarea")?.value ?? "";
  return (taken.FIELD = theirs.replace(/\\s*<adapter:[^<>]*>/gi, "").trim());
}"""


def follow_prompt(tabs: gr.Tabs, prompt: gr.Textbox, name: str) -> None:
    """Fill in the prompt of Generate when a tab is chosen, where ``prompt`` is empty or still what was filled in.

    Args:
        name: of this prompt, a word that no other one has.
    """
    tabs.select(
        None, prompt, prompt, js=_FOLLOW.replace("FIELD", name), show_progress="hidden", api_visibility="private"
    )
