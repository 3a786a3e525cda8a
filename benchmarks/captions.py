"""Time to encode captions in the order of the annotations and from short to long, as the evaluation does."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.rounds import interleaved
from configs.arguments import Parser, positive
from configs.schema import load_config
from datasets.collate import longest
from model.build import build_encoder
from model.encoders import Encoder
from utils.distributed import default_device, describe_device
from utils.exit import exit_on_user_error
from utils.precision import autocast

# Of CUHK-PEDES's lengths in tokens: 29 on average, 13 to 77.
LOG_MEAN, LOG_DEVIATION, SHORTEST = 3.33, 0.33, 13


def random_captions(number: int, columns: int, vocab_size: int) -> Tensor:
    """Ids (N, columns) of random captions with realistic lengths."""
    lengths = torch.exp(LOG_MEAN + LOG_DEVIATION * torch.randn(number)).round().clamp(SHORTEST, columns).long()
    ids = torch.randint(1, vocab_size - 3, (number, columns))
    places = torch.arange(columns)
    ids[places == lengths[:, None] - 1] = vocab_size - 1
    return ids.masked_fill(places >= lengths[:, None], 0)


@torch.no_grad()
def encoded(encoder: Encoder, ids: Tensor, order: Tensor, batch: int, precision: str) -> Tensor:
    """Unit vectors (N, D) of captions, encoded in an order."""
    rows = []
    with autocast(default_device(), precision):
        for places in order.split(batch):
            columns = longest(ids[places])
            rows.append(encoder.encode_text(ids[places, :columns].to(default_device())).joint)
    return F.normalize(torch.cat(rows)).cpu()[order.argsort()]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default="configs/baseline.yaml", help="default: configs/baseline.yaml")
    parser.add_argument("--captions", type=positive, default=2000, help="default: 2000")
    parser.add_argument("--batch", type=positive, default=256, help="captions in a forward pass; default: 256")
    parser.add_argument("--rounds", type=positive, default=3, help="default: 3")
    with exit_on_user_error():
        arguments = parser.parse_args()
        torch.manual_seed(0)
        config = load_config(arguments.config)
        encoder = build_encoder(config, pretrained=False).to(default_device()).eval()
        ids = random_captions(arguments.captions, config.data.text_length, encoder.vocab_size)
        lengths = (ids != 0).sum(1)
        orders = {"as annotated": torch.arange(len(ids)), "by length": lengths.argsort(stable=True)}
        what = f"{len(ids)} captions of {lengths.double().mean():.1f} tokens, batches of {arguments.batch}"
        print(f"{describe_device(default_device())}, {what}\n")
        print("| order | precision | seconds, median | range | x as annotated |\n|---|---|---:|---:|---:|")
        for precision in ("fp32", "bf16"):
            ways = {
                name: partial(encoded, encoder, ids, order, arguments.batch, precision)
                for name, order in orders.items()
            }
            one, other = (way() for way in ways.values())
            rounds = interleaved(ways, arguments.rounds)
            for name in ways:
                print(f"| {name} | {precision} | {rounds.cells(name)} | {rounds.ratio(name, 'as annotated'):.2f} |")
            print(f"\n{rounds.note}; vectors differ by at most {(one - other).abs().max():.1e}\n", flush=True)


if __name__ == "__main__":
    main()
