"""The part of `odd_modules.SOURCE` with unusual layers, forward passes and factories; it uses that file's imports."""

SOURCE = """
# --- layers

class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(3)
        )

    def forward(self, x):
        return self.body(x)


class LazyUnused(Net):
    def __init__(self):
        super().__init__()
        self.auxiliary = nn.LazyLinear(3)


def lazy():
    return Lazy()


def lazy_unused():
    return LazyUnused()


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.last = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.last(torch.relu(self.conv(torch.relu(self.stem(x.flatten(2)))))).mean(2))


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(24, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.conv(torch.relu(self.stem(x[:, None]))))
        return self.head(self.last(x.flatten(1, 2)).mean((2, 3)))


class FiveAxes(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, 1, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.scale.reshape(())


class Transposed(Net):
    def __init__(self):
        super().__init__()
        self.wide = nn.ConvTranspose2d(8, 12, 3, 2)


class Reused(Net):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 16, 1)

    def features(self, x):
        x = torch.relu(self.stem(x))
        return self.last(self.wide(torch.relu(self.wide(x))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Unused(Net):
    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Conv2d(8, 8, 1)


class Circular(Net):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular")


class Zeros(Net):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.wide.weight)


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class InPlace(Net):
    def features(self, x):
        x = F.relu_(self.stem(x))
        x += self.bn(x)
        return F.relu_(self.last(self.wide(x)))


class PlainTensor(Net):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(16, 1, 1)

    def features(self, x):
        return super().features(x) * self.scale


def sequences():
    return Sequences()


def volumes():
    return Volumes()


def five_axes():
    return FiveAxes()


def transposed():
    return Transposed()


def reused():
    return Reused()


def attention():
    return Attention()


def unused():
    return Unused()


def circular():
    return Circular()


def zeros():
    return Zeros()


def frozen():
    return Frozen()


def in_place():
    return InPlace()


def plain_tensor():
    return PlainTensor()


def bare_layer():
    return nn.Conv2d(3, 8, 3)


def no_parameters():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def only_linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 3))


# --- forward passes and factories

class TwoInputs(Net):
    def forward(self, x, mask):
        return super().forward(x) * mask


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)


class Branching(Net):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if bool(y.sum() > 0) else y


class ToCuda(Net):
    def forward(self, x):
        return super().forward(x.to("cuda:99"))


class KeywordOnly(Net):
    def forward(self, x, *, scale):
        return super().forward(x) * scale


class Outputs(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


def two_inputs():
    return TwoInputs()


def keyword_only():
    return KeywordOnly()


def no_forward():
    return NoForward()


def branching():
    return Branching()


def to_cuda():
    return ToCuda()


def outputs():
    return Outputs()


def with_arguments(classes):
    return Net(classes=classes)


def exits():
    raise SystemExit(4)


def returns_class():
    return Net
"""
