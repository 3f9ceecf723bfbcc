"""A page in the browser: draw images, keep a prologue and draw the rest anew, change single
prologue tokens, draw variations of a picture of one's own.

    pip install gradio
    python tools/demo.py                    # the pair in out/, else the shipped one
    python tools/demo.py --out l_xl         # a released pair that tools/released.py has imported
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretokenize import center_crop
from sample import (PRESETS, decode, default_preset, draw, load_pair, pack_for_cpu,
                    preset_settings)
from tokenizer import HelpFormatter, InputError, to_float, to_uint8, whole

# The settings that have a slider, and its ends
SLIDERS = {
    "cfg_visual": (0, 20),
    "cfg_prologue": (0, 3),
    "cfg_power": (0.05, 3),
    "temperature": (0.1, 1.5),
    "temperature_prologue": (0.1, 1.5),
}


class Session:
    """What the buttons do. The page keeps what they return: pictures, the prologue of each (n, K),
    the table of these, the seed, and a sentence.

    chosen: the values of SLIDERS, in their order. picture and position count from 1. uploaded: a
    PIL image in RGB. share: of its rows, from the top, that are kept.
    """

    def __init__(self, tokenizer, ar, columns):
        self.tokenizer = tokenizer
        self.ar = ar
        self.columns = columns
        self.names = ar.cfg.classes or [str(i) for i in range(ar.cfg.num_classes)]

    @torch.no_grad()
    def paint(self, label, seed, chosen, prologue=None, visual=None):
        """Pictures, their prologues (n, K), and the table of these; drawn with `prologue` (n, K)
        and behind the visual codes (n, m) if they are given."""
        n = self.columns
        labels = torch.full((n,), self.names.index(label))
        settings = dict(zip(SLIDERS, chosen))
        codes = draw(self.ar, labels, range(n), int(seed), n, settings, prologue, visual)
        images = decode(self.tokenizer, codes, n)  # (n, H, W, 3)
        prologue = codes[:, : self.ar.cfg.num_prologue].cpu()
        table = [[i + 1, *row] for i, row in enumerate(prologue.tolist())]
        return list(images.numpy()), prologue, table

    def resample_all(self, label, seed, *chosen):
        pictures, prologue, table = self.paint(label, seed, chosen)
        return pictures, prologue, table, "Each picture has a prologue of its own."

    def keep_prologue(self, label, seed, picture, prologue, *chosen):
        if prologue is None:  # before anything has been drawn
            prologue = self.paint(label, seed, chosen)[1]
        seed = int(seed) + 1
        kept = prologue[int(picture) - 1].expand(self.columns, -1)
        pictures, prologue, table = self.paint(label, seed, chosen, kept)
        text = f"All pictures share prologue {int(picture)}; their visual tokens are drawn anew."
        return pictures, prologue, table, seed, text

    def change_token(self, label, seed, picture, position, code, prologue, *chosen):
        if prologue is None:
            prologue = self.paint(label, seed, chosen)[1]
        changed = prologue.clone()
        changed[int(picture) - 1, int(position) - 1] = int(code)
        pictures, prologue, table = self.paint(label, seed, chosen, changed)
        text = (f"Token {int(position)} of prologue {int(picture)} is now {int(code)}; the noise "
                "behind the visual tokens is the same as before.")
        return pictures, prologue, table, text

    @torch.no_grad()
    def vary_picture(self, label, seed, uploaded, share, *chosen):
        if uploaded is None:
            pictures, prologue, table, _ = self.resample_all(label, seed, *chosen)
            return pictures, prologue, table, "There is no picture of yours yet: upload one."
        cfg = self.tokenizer.cfg
        k = cfg.num_prologue
        rows = min(round(share * cfg.grid), cfg.grid - 1)  # as sample.py's --keep
        crop = torch.tensor(center_crop(uploaded, cfg.image_size))  # (H, W, 3)
        x = to_float(crop.permute(2, 0, 1)[None]).to(self.ar.head.weight.device)
        codes = self.tokenizer.encode(x)  # (1, K+N)
        kept = codes.expand(self.columns, -1)
        prologue = kept[:, :k] if k > 0 else None
        visual = kept[:, k : k + rows * cfg.grid]
        pictures, prologue, table = self.paint(label, seed, chosen, prologue, visual)
        pictures = [crop.numpy(), to_uint8(self.tokenizer.decode(codes))[0].numpy(), *pictures]
        text = (f"Your picture, its reconstruction, then pictures 1 to {self.columns}, whose lower "
                f"{cfg.grid - rows} of {cfg.grid} rows of patches are drawn anew.")
        return pictures, prologue, table, text


def build_page(session, settings):
    """The gradio page; settings are where the sliders start."""
    import gradio

    cfg = session.tokenizer.cfg
    k = cfg.num_prologue
    with gradio.Blocks(title="Prologue") as page:
        gradio.Markdown("# Prologue\nAn image is *[prologue tokens] + [visual tokens]*. Draw, keep "
                        "a prologue, change one token.")
        prologue = gradio.State(None)
        with gradio.Row():
            label = gradio.Dropdown(session.names, value=session.names[0], label="class")
            seed = gradio.Number(0, label="seed", precision=0)
        with gradio.Row():
            sliders = []
            for name, (low, high) in SLIDERS.items():
                sliders.append(gradio.Slider(low, high, settings[name], label=name))
        draw_all = gradio.Button("resample all", variant="primary")
        pictures = gradio.Gallery(columns=5, height="auto", label="pictures", object_fit="contain")
        text = gradio.Markdown()
        headers = ["picture"] + [f"p{i + 1}" for i in range(k)]
        table = gradio.Dataframe(headers=headers, label="prologue codes", visible=k > 0)
        for event in (draw_all.click, page.load):
            event(session.resample_all, [label, seed, *sliders], [pictures, prologue, table, text])
        if k > 0:
            with gradio.Row():
                picture = gradio.Slider(1, session.columns, 1, step=1, label="picture")
                position = gradio.Slider(1, k, 1, step=1, label="prologue token")
                code = gradio.Slider(0, cfg.prologue_codebook_size - 1, 0, step=1, label="new code")
            with gradio.Row():
                keep = gradio.Button("keep the prologue of that picture, resample the rest")
                change = gradio.Button("change that token")
            keep.click(session.keep_prologue, [label, seed, picture, prologue, *sliders],
                       [pictures, prologue, table, seed, text])
            change.click(session.change_token,
                         [label, seed, picture, position, code, prologue, *sliders],
                         [pictures, prologue, table, text])
        if cfg.layout != "1d":  # it has neither a prologue nor rows of patches that could be kept
            lowest = 0 if k > 0 else 1 / cfg.grid
            with gradio.Row():
                uploaded = gradio.Image(type="pil", sources=["upload", "clipboard"], height=200,
                                        label="a picture of your own")
                with gradio.Column():
                    share = gradio.Slider(lowest, 1, lowest, label="share of rows to keep")
                    vary = gradio.Button("draw the rest of your picture anew")
            vary.click(session.vary_picture, [label, seed, uploaded, share, *sliders],
                       [pictures, prologue, table, text])
    return page


def parse_args():
    parser = argparse.ArgumentParser(description="A page to draw images on.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("--out", default="out", help="folder where the pair is looked for")
    flag("--tokenizer", help="tokenizer file; by default that in --out")
    flag("--ar", help="AR file; by default that in --out; without any of these, the shipped pair")
    flag("--preset", choices=PRESETS,
         help="settings to start with; by default the AR file's own or tiny, for a model of one "
         "class unguided")
    flag("--columns", type=whole(1), default=8, help="pictures drawn at a time")
    flag("--port", type=whole(0), default=7860, help="of the page on this machine")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError("the page needs gradio: pip install gradio") from None
    available = "cpu"
    if torch.accelerator.is_available():
        available = torch.accelerator.current_accelerator().type  # cuda, or mps on a Mac
    if args.device not in ("auto", "cpu", available):
        raise InputError(
            f"--device {args.device} cannot be used: torch finds only {available} here"
        )
    device = torch.device(available if args.device == "auto" else args.device)
    tokenizer, ar, paths = load_pair(args, device)
    if device.type == "cpu":
        pack_for_cpu(ar)
    preset = args.preset or default_preset(ar)
    print(f"{paths[0]} and {paths[1]}, preset {preset}", flush=True)
    page = build_page(Session(tokenizer, ar, args.columns), preset_settings(preset))
    page.launch(server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    main()
