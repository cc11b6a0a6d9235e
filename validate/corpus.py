"""Short texts that find tokenizer mistakes.

Every text of CORPUS is in Unicode's NFC: a tokenizer that normalizes leaves it as it is. DECOMPOSED is not, so a
runtime that does not normalize differs there from one that does.
"""

from __future__ import annotations

WHITESPACE = (
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t\n",
    "\r\n",
    " \n ",
    "a  b   c    d     e",
    "  leading and trailing  ",
    "tab\tseparated\tvalues\n1\t2\t3\n",
    "line one\nline two\r\nline three\n\n\nline six",
    "    def f(x):\n        return x\n\n\n    # done",
    "no-break\u00a0space, thin\u2009space, ideographic\u3000space",
)
WORDS = (
    "Hello world",
    " Hello world",
    "Hello, y'all! How are you?",
    "HELLO hello HeLLo hELLO",
    "I'm, you're, he's, we've, they'll, I'd, don't, it's 5 o'clock",
    "I'M YOU'RE HE'S WE'VE THEY'LL I'D DON'T",
    "'sound 'tis 're 'cause ''quoted''",
    "Once upon a time, there was a little girl named Lily. She loved to play outside.",
    "The quick brown fox jumps over the lazy dog.",
    "antidisestablishmentarianism Donaudampfschifffahrtsgesellschaft",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ababababababababab xyxyxyxyx",
    "x",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
    "e-mail: someone@example.org, https://example.org/a/b?c=d&e=f#g",
)
DIGITS = (
    "0",
    "3",
    "33",
    "333",
    "3333",
    "33333",
    "333333333",
    "1234567890",
    "3.14159, 1,000,000, -42, 6.02e23, 0xdeadbeef",
    "in 1984 and 2025 at 12:34:56.789 on 2025-01-31",
    "a1b2c3 x10 10x v1.2.3",
    "½ ¼ ² ³ ① Ⅳ ٣٤٥ १२३ 一二三",
)
SYMBOLS = (
    "!",
    "!!!???...",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~\\",
    "a+b=c; a<b && c>d || !e ? f : g",
    "“curly” ‘quotes’ — dashes – and … ellipses",
    "€ £ ¥ ₹ ¢ § ¶ © ® ™ ° µ ± × ÷ ≠ ≤ ≥ ∞ √ ∑ ∫",
    '<div class="a">&amp;</div> <!-- c -->',
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }",
    "$x^2 + \\frac{1}{2}$ \\begin{align} \\alpha &= \\beta \\end{align}",
    "// comment\n/* block */ # hash -- dash ;; lisp",
)
SCRIPTS = (
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Größe, naïve café, über, Ærøskøbing, İstanbul, ß",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "אני יכול לאכול זכוכית",
    "أنا قادر على أكل الزجاج",
    "मैं काँच खा सकता हूँ",
    "ฉันกินกระจกได้",
    "កាន់តែពិសេសអាចខលចេញ",
    "我想在apple工作1314151天～",
    "私はガラスを食べられます。カタカナ、ひらがな、漢字",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요",
    "中文，标点。全角ＡＢＣ１２３！？",
    "Tiếng Việt có dấu",
)
EMOJI = (
    "🦙.cpp",
    "🚀 (normal) ✅ 😶‍🌫️ (several joined) 👩‍👩‍👧‍👦 👍🏽 🇩🇪",
    "text\ufe0f and ❤️‍🔥 with joiners\u200d",
    "𝒜𝒷𝒸 𝟙𝟚𝟛 𓀀 𐍈",
    "zero\u200bwidth and soft\u00adhyphen",
)
CORPUS: tuple[str, ...] = (*WHITESPACE, *WORDS, *DIGITS, *SYMBOLS, *SCRIPTS, *EMOJI)
DECOMPOSED: tuple[str, ...] = ("cafe\u0301", "A\u030angstro\u0308m", "\u1100\u1161\u11a8", "\ufb01 \u2126")


def special_texts(tokens: list[str]) -> tuple[str, ...]:
    """Returns texts that use special or added tokens: each alone, between words, in a row."""
    around = tuple(f"before{token}after" for token in tokens)
    spaced = tuple(f"before {token} after" for token in tokens)
    return (*tokens, *around, *spaced, "".join(tokens[:20]))
