"""Why each setting is recommended, in both languages; the order is that of the table."""

__all__ = ["REASONS"]

REASONS = {
    "en": {
        "data.max_length": "long enough to leave nearly all tokens in whole documents",
        "parallel.mode": "each batch's sequences get groups of their own size, so short ones don't "
        "pay for long ones",
        "parallel.sp": "the fewest ranks whose memory holds the longest sequence",
        "parallel.order": "gives every rank of a sequence the same amount of attention",
        "parallel.inside": "fewest seconds on the links that were measured",
        "train.dtype": "halves memory and traffic; weights and sums stay in float32",
        "train.checkpointing": "memory that is short is bought with a little time",
        "train.accumulate": "as many sequences a step as the learning rate was chosen for",
        "optimizer.lr": "the usual start for a model of this size; lower it if the loss spikes",
        "outer.sync_every": "the sites' link carries what is due in so many steps",
        "outer.codec": "an eighth of the bytes, without loss of quality in the published trials",
        "checkpoint.every": "what a failure can cost at most",
        "train.timeout_s": "how long a silent machine may hold up the others",
    },
    "ja": {
        "data.max_length": "診断の結果、ほぼすべてのトークンを文書を切らずに扱える長さ",
        "parallel.mode": "文書の長さに合わせて装置の組を作り、短い文書を待たせない",
        "parallel.sp": "最長の文書がメモリに収まる最小の装置数",
        "parallel.order": "一つの文書を分担する装置の計算量を均等にする",
        "parallel.inside": "実測した回線で最も速い分担方法",
        "train.dtype": "メモリと通信量を半減。重みと合計は高精度のまま",
        "train.checkpointing": "不足するメモリを、わずかな計算時間で補う",
        "train.accumulate": "学習率に見合う1ステップあたりの文書量",
        "optimizer.lr": "この規模のモデルで一般的な初期値。損失が急上昇する場合は下げる",
        "outer.sync_every": "拠点間の回線が待ちなしで送り終えられる間隔",
        "outer.codec": "通信量は8分の1。公表された検証では品質の低下なし",
        "checkpoint.every": "障害時に失う作業の上限",
        "train.timeout_s": "応答のない装置を待つ上限",
    },
}
