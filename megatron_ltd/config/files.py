"""What a run reads and writes: text, checkpoints, reports."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus and tokenizer."""

    data_path: tuple[str, ...] | None = None
    """Prefix of a .bin/.idx corpus, or several, or WEIGHT PREFIX pairs."""
    train_data_path: tuple[str, ...] | None = None
    """Like --data-path, for training only; --split is then ignored. PREFIX@0:0.9 reads that part of a corpus.
    For ViT: a folder with one subfolder of images per class (needs Pillow), or an idx file of images and one of labels,
    plain or .gz."""
    valid_data_path: tuple[str, ...] | None = None
    """Like --data-path, for validation only. NAME=PREFIX ...: several sets with a loss each; `validation_loss` is then
    their mean."""
    multiple_validation_sets: bool = False
    """The corpora of --valid-data-path, given without weights, are sets with a loss each, named 0, 1, ... in order."""
    validation_set_names: tuple[str, ...] | None = None
    """Names of the sets of --multiple-validation-sets."""
    test_data_path: tuple[str, ...] | None = None
    """Like --data-path, for a test set that is evaluated once, after the last step."""
    split: str = "969,30,1"
    """Shares of --data-path for training, validation and test."""
    data_cache_path: str | None = None
    """Folder for cached index files, and for the record that a corpus was checked. Default: none; at every start
    corpora are checked in full and indices are built in memory."""
    verify_corpus: bool = False
    """Read corpora and index files in full even if they were checked before and have not changed since, and compare
    corpora with the checksums in their manifests."""
    mock_data: bool = False
    """Random tokens in place of a corpus, for throughput runs."""
    train_jsonl: tuple[str, ...] | None = None
    """Finetuning on prompts and responses, or conversations: files or globs with one JSON object per line (.jsonl,
    .jsonl.gz, .jsonl.zst), instead of a corpus. The loss covers the responses only."""
    valid_jsonl: tuple[str, ...] | None = None
    """Like --train-jsonl, for validation. NAME=FILE ...: several sets with a loss each."""
    test_jsonl: tuple[str, ...] | None = None
    """Like --train-jsonl, for a test set that is evaluated once, after the last step."""
    image_augmentation: Literal["none", "crop", "crop-flip"] = "none"
    """Randomly shift ViT's training images by up to an eighth of their size; `crop-flip` also mirrors them at
    random."""
    prompt_key: str = "prompt"
    """Key of the prompt in a line of --train-jsonl."""
    response_key: str = "response"
    """Key of the response in a line of --train-jsonl."""
    messages_key: str = "messages"
    """Key of the messages in a line of --train-jsonl that is a conversation: a list of role (system, user or assistant)
    and content. The loss covers what the assistant says in each of its turns."""
    chat_template: str | None = None
    """Jinja template that makes a text of a conversation. Default: the tokenizer's, from the chat_template.jinja or
    tokenizer_config.json beside its files; otherwise a plain one (docs/finetuning.md)."""
    overlong_samples: Literal["refuse", "skip"] = "refuse"
    """What to do if a prompt and its response are longer than --seq-length: `refuse` stops with an error before
    training, `skip` leaves the example out and counts it. Examples are never truncated."""
    num_workers: int = 0
    """Background threads that read the next step's samples; with 0 they are read when needed."""
    tokenizer_type: Literal["GPT2BPETokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer",
                            "BertWordPieceLowerCase", "BertWordPieceCase", "NullTokenizer"] | None = None
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """SentencePiece .model file, a Hugging Face tokenizer.json or its folder, or Llama 3's file of tokens and ranks."""
    vocab_file: str | None = None
    """vocab.json of GPT-2 BPE, or vocab.txt of BERT's WordPiece."""
    merge_file: str | None = None
    """merges.txt of GPT-2 BPE."""
    bos_token: str | None = None
    """The token with which documents, finetuning examples and scored texts begin: its text, or `auto` for the one that
    the tokenizer's files say to add, if any. Default: none."""
    eod_token: str | None = None
    """The text of the token that ends documents. Default: the one that the tokenizer's files declare as the end of a
    text, or else a common one (docs/corpus.md)."""
    tokenizer_control_symbols: bool = False
    """Read the name of a SentencePiece model's control symbol in a text, such as <s>, as that symbol rather than as
    letters."""
    eod_mask_loss: bool = False
    """No loss where the input token is the end of a document."""
    reset_position_ids: bool = False
    """Count positions from the start of each document."""
    reset_attention_mask: bool = False
    """No attention across document boundaries."""
    fim_data: bool = False
    """Fill-in-the-middle (https://arxiv.org/abs/2207.14255): move the middle of some documents of a GPT corpus to their
    end, marked by the tokens named below. The tokenizer must have these."""
    fim_rate: float = 0.5
    """Share of documents that --fim-data rearranges; if a sample holds only a part of a document, that part is
    rearranged."""
    fim_spm_rate: float = 0.5
    """Share of the rearranged documents in which the suffix comes first (SPM), then the prefix and the middle."""
    fim_split_sample: str | None = None
    """Token between the fragments of a document, such as the files of a repository, which are rearranged one by
    one."""
    fim_fragment_rate: float | None = None
    """With --fim-split-sample: share of fragments that are rearranged in the documents that --fim-rate chooses.
    Default: --fim-rate."""
    fim_no_prefix: str | None = None
    """Do not rearrange a text that begins with this."""
    fim_prefix_token: str = "<fim_prefix>"
    """Token that marks the text before the middle."""
    fim_middle_token: str = "<fim_middle>"
    """Token that marks the middle."""
    fim_suffix_token: str = "<fim_suffix>"
    """Token that marks the text after the middle."""
    fim_pad_token: str = "<fim_pad>"
    """Token that fills up a sample that has become shorter; it has no loss."""
    fim_eod_token: str | None = None
    """Token between documents. Default: the tokenizer's end-of-document token."""
    mask_prob: float = 0.15
    """Share of BERT's tokens that are predicted."""
    mask_max_ngram: int = 3
    """Maximum number of consecutive words that BERT predicts; single words are most likely."""
    mask_whole_word: bool = True
    """Mask whole words for BERT rather than single word pieces."""
    mask_longer_ngrams: bool = False
    """Make longer spans of predicted words more likely than shorter ones."""
    mask_geometric: bool = False
    """Draw span lengths from a geometric distribution with p = 0.2 (https://arxiv.org/abs/1907.10529, section 3.1)."""
    short_seq_prob: float = 0.1
    """Share of BERT's samples that are deliberately shorter than --seq-length."""

    @property
    def validation_paths(self) -> tuple[str, ...]:
        """What names the validation sets, apart from --data-path with --split."""
        return (self.valid_data_path if self.train_jsonl is None else self.valid_jsonl) or ()


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and loading."""

    save: str | None = None
    """Folder for checkpoints."""
    load: str | None = None
    """Folder to resume from, or an fsspec URL from which its newest checkpoint is copied first. A folder without a
    checkpoint is an error, unless it is empty and also given as --save or --upload."""
    save_interval: int | None = None
    """Save every this many steps; the last step is always saved."""
    save_retain_interval: int | None = None
    """Keep only the newest two checkpoints and those of steps divisible by this."""
    upload: str | None = None
    """Copy each finished checkpoint to this folder in the background: an fsspec URL such as s3://bucket/run, or a
    path."""
    upload_retain: int | None = None
    """Keep only this many copies there, the newest ones."""
    async_save: bool = False
    """Write checkpoints in the background."""
    finetune: bool = False
    """Load weights only; the step, sample counter and optimizer start from scratch."""
    pretrained_checkpoint: str | None = None
    """Finetuning: folder of the model to start from. It is loaded as by --load with --finetune as long as --load holds
    no checkpoint, so that one command both starts and resumes a run."""
    resize_vocabulary: bool = False
    """With --finetune or --pretrained-checkpoint: give the model rows for the tokens that this run's tokenizer has and
    the checkpoint's tokenizer does not. New rows start at the mean of the others."""
    no_load_optim: bool = False
    """Do not load optimizer state."""
    no_save_optim: bool = False
    """Do not save optimizer state."""
    use_checkpoint_args: bool = False
    """Take the model's settings from the checkpoint rather than from flags; the tokenizer, too, where no flag
    names one. With --finetune a table of n-grams and convolutions that its model does not have may be added."""
    ckpt_step: int | None = None
    """Load this step rather than the newest."""
    load_fallback: bool = False
    """If the checkpoint to load is damaged, continue from the newest sound one of an earlier step, with a warning."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run logs, and how often it evaluates."""

    log_interval: int = 100
    """Print a training line every this many steps."""
    log_format: Literal["auto", "short", "megatron"] = "auto"
    """Form of the training line: one of at most 120 columns, with a progress bar on a terminal; or Megatron-LM's, which
    tools parse. `auto` is short on a terminal, and Megatron-LM's where the output is redirected."""
    eval_interval: int = 1000
    """Evaluate on the validation set every this many steps."""
    eval_iters: int = 100
    """Global batches per evaluation, of each validation set; 0 turns evaluation off."""
    full_validation: bool = False
    """Evaluate on the whole validation set, or sets, rather than on --eval-iters batches."""
    eval_tasks: str | None = None
    """Score the model on these tasks during the run: TASK or TASK=FILE, separated by commas, as in
    tools/evaluate_zeroshot.py; a name that is not built in there is a task of lm-evaluation-harness. A task that fails
    is reported and does not stop the run."""
    eval_tasks_interval: int | None = None
    """Score --eval-tasks every this many steps, and at the end. Default: at the end only."""
    eval_tasks_limit: int | None = None
    """Score only this many examples of each task."""
    task_data: str | None = None
    """Folder with the files of --eval-tasks, such as lambada/lambada_test.jsonl; nothing is downloaded for tasks that
    are built in."""
    metrics_file: str | None = None
    """Append one JSON object per logged step and per evaluation to this file."""
    tensorboard_dir: str | None = None
    """Write TensorBoard events here."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project (needs the wandb package)."""
    profile: bool = False
    """Write a torch profiler trace of steps 10 to 12 beside the metrics file, or in the current folder without one."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device, for MFU. Default: looked up by name for known GPUs; otherwise MFU is not printed."""

    @property
    def evaluates(self) -> bool:
        return self.eval_iters > 0 or self.full_validation
