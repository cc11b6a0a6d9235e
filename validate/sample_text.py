"""The text that is read when the user gives none: stories, prose, code, numbers and other languages.

Written for this project and licensed with it. It is short on purpose: about nine chunks of 256 tokens with a large
vocabulary, more with a small one. A figure on it says whether an artifact is sound; for how good a model is in your
field, give a text of that field.
"""

from __future__ import annotations

SAMPLE_TEXT = """\
Once upon a time, there was a little otter named Pip who lived beside a slow green river. Every morning Pip floated \
on his back and counted the clouds. One day he saw something shiny under the water. It was a small brass key! "What \
does it open?" he asked his sister, Mina. Mina did not know. They asked the old turtle, and the turtle smiled. "A \
key wants a door," she said, "but first it wants a friend who is patient."

So Pip and Mina looked for the door. They looked under the bridge, but there were only stones. They looked inside \
the hollow tree, but there were only two sleepy owls. Pip was sad and wanted to throw the key away. "Wait," said \
Mina. "Let us look once more, near the mill." Behind the wheel of the mill they found a tiny blue box. The key went \
in with a click. Inside the box was a whistle, and a note: "Blow when you are lost." From that day on, the two \
otters never feared the fog, because each of them could always find the other.

Lily had a red kite and a very big dog called Bear. She liked to run on the hill with him. The wind was strong, and \
the kite went up, up, up. Then the string broke! Lily started to cry. Bear barked and ran after the kite. He ran \
past the pond, past the farm, and past the baker's house. When he came back, his nose was full of flour and the \
kite was in his mouth. Lily laughed and gave him a hug. "You are the best dog," she said. Her mom made soup, and \
they were all happy.

Tom wanted to bake a cake for his grandma. He mixed flour, milk and three eggs in a bowl. He forgot the sugar. The \
cake looked nice, but it tasted like bread. Grandma took a bite and thought for a while. "It is a very good bread," \
she said. "Let us put some jam on it." They ate it together on the porch and watched the sun go down.

The ferry left the island at a quarter to six, carrying eleven passengers, a crate of lemons and a piano that \
nobody had claimed. Halfway across the strait the engine coughed, recovered, and coughed again. The captain, who \
had crossed this water some nine thousand times, did not look up from her crossword. She knew the difference \
between an engine that was failing and an engine that merely wanted attention, and she had learned to distrust only \
the first. By the time the harbour lights came into view the younger passengers had begun to sing, badly, in three \
keys at once, while someone with a sense of occasion picked out the tune on the unclaimed piano.

A bridge is a negotiation between weight and distance. Stone answers by pressing against itself; steel answers by \
pulling. The first builders of arches could not have written down the forces they tamed, yet their rule of thumb, \
that a hanging chain turned upside down makes a standing arch, is exactly what the mathematics later confirmed. \
What changed in the nineteenth century was not only the material but the habit of calculating before building. \
Failures became instructive because somebody had predicted otherwise, and a prediction that turns out wrong is \
worth more than a success that nobody can explain.

Rainfall over the valley has been recorded since 1874. The driest year on record is 1921, with 388 millimetres; the \
wettest is 2002, with 1,146. The thirty-year mean rose from 702.4 mm to 731.9 mm, an increase of about 4.2 percent, \
but the number of rainy days fell from 171 to 158. In other words, it rains less often and harder. On 14 July the \
gauge at the upper weir collected 61.5 mm in ninety minutes, which is more than the station had seen in any whole \
July before 1950.

How to repot a fern: 1. Water it the evening before. 2. Tip the pot and ease the roots out; do not pull at the \
leaves. 3. Choose a pot only two centimetres wider. 4. Fill it with loose soil, leaving a finger's breadth at the \
rim. 5. Keep it out of direct sun for a week. If the tips turn brown, the air is too dry; if the whole leaf turns \
yellow, the soil is too wet.

From: Ana Duarte <ana@example.org>
To: facilities@example.org
Subject: Room 4.12 - heating (second request)

Good morning,
the radiator in room 4.12 still does not switch off. Yesterday at 15:30 it was 27.5 °C with both windows open. \
Could somebody look at the valve before Thursday? We expect 18 visitors, and the spare key is with reception \
(extension 2207).
Kind regards,
Ana

def moving_average(values, width):
    \"\"\"Return the mean of each run of `width` neighbouring values.\"\"\"
    if width < 1:
        raise ValueError(f"width must be positive, not {width}")
    total = sum(values[:width])
    means = [total / width]
    for old, new in zip(values, values[width:]):
        total += new - old
        means.append(total / width)
    return means

#include <stdio.h>

int main(void) {
    int counts[26] = {0};
    for (int c; (c = getchar()) != EOF;) {
        if (c >= 'a' && c <= 'z') counts[c - 'a']++;
    }
    for (int i = 0; i < 26; i++) {
        printf("%c %d\\n", 'a' + i, counts[i]);
    }
    return 0;
}

SELECT city, COUNT(*) AS visits, ROUND(AVG(minutes), 1) AS mean_minutes
FROM trips
WHERE started_at >= '2019-03-01' AND minutes BETWEEN 2 AND 240
GROUP BY city
HAVING COUNT(*) > 50
ORDER BY visits DESC;

{"station": "upper weir", "readings": [{"t": 0, "level": 1.42}, {"t": 900, "level": 1.57}], "unit": "m", "ok": \
true}

| fruit  | kg  | price |
|--------|-----|-------|
| apples | 12  | 18.60 |
| plums  | 7.5 | 22.13 |
| pears  | 9   | 17.01 |

The sum of the first n odd numbers is n squared: 1 = 1, 1 + 3 = 4, 1 + 3 + 5 = 9, 1 + 3 + 5 + 7 = 16. To see why, \
draw a square of dots and add an L-shaped border: a square of side k needs exactly 2k + 1 more dots to become a \
square of side k + 1. If f(x) = 3x^2 - 12x + 7, then f'(x) = 6x - 12, which is zero at x = 2, where f(2) = -5. A \
train that covers 84 km in 35 minutes moves at 144 km/h; at that speed 500 km take 3 hours, 28 minutes and 20 \
seconds.

Q: Which is heavier, a litre of water or a litre of ice?
A: The litre of water. Ice takes up about nine percent more room for the same mass, which is why it floats.

Q: Why does a mirror swap left and right but not up and down?
A: It swaps neither; it swaps front and back. We call the result left and right because we imagine walking around \
to the other side, and people turn about a vertical line.

Der alte Uhrmacher öffnete jeden Morgen um halb acht seinen Laden, obwohl seit Jahren kaum noch jemand eine Uhr \
brachte. Er prüfte zuerst die große Pendeluhr am Fenster, dann die kleinen, und schließlich seine eigene. Alle \
gingen richtig, nur die seine ging fünf Minuten vor. »So habe ich immer ein wenig Zeit übrig«, sagte er.

La boulangère du village connaissait les habitudes de chacun : deux baguettes pour l'instituteur, un pain de seigle \
pour la veuve d'en face, et rien le lundi. Un matin, elle trouva devant sa porte un panier de cerises et un mot \
sans signature. Elle en fit une tarte, la coupa en douze parts, et la donna à tous ceux qui passèrent avant midi.

El río bajaba crecido después de tres días de lluvia. Los niños contaban las ramas que pasaban y apostaban cuál \
llegaría primero al puente. «La mía», decía siempre el más pequeño, y siempre señalaba una rama distinta. ¿Quién \
podía llevarle la contraria?

Il gatto del faro dormiva di giorno e di notte guardava le barche. Quando la nebbia copriva tutto, saliva sul \
davanzale e aspettava, come se fosse lui a tenere accesa la luce.

Старый трамвай шёл через мост медленно, и пассажиры успевали рассмотреть лёд на реке. Кондуктор знал всех по именам \
и никогда не спрашивал билеты у тех, кто вёз цветы.

山の上の小さな駅には、一日に二本だけ列車が来る。駅長は花に水をやり、時計を合わせ、誰も降りないとわかっていても帽子をかぶって待つ。

从前有一位老木匠,他做的椅子从不摇晃。有人问他有什么秘诀,他笑着说:“先量三次,再锯一次。”

في كل مساء كان الصياد يعود إلى الميناء ومعه سلة صغيرة وحكاية طويلة.

한 소년이 언덕 위에서 연을 날리고 있었다. 바람이 멈추자 그는 조용히 기다렸다.

The word "run" has more meanings than almost any other: a river runs, a nose runs, a clock runs down, a colour runs \
in the wash; one can run a shop, a risk, a fever or a finger along a shelf. Dictionaries list hundreds of senses, \
and yet a child of four uses it without hesitation. It seems that we do not choose among the senses at all. We hear \
the whole sentence, and the sentence leaves room for only one of them.

Ben and Sue were in the park. Ben had a ball and Sue had a rope. "Can I play with your ball?" asked Sue. "Yes," \
said Ben, "and can I jump with your rope?" They played all day. When it was time to go home, Ben forgot his ball, \
and Sue forgot her rope. The next day the ball and the rope were still there, side by side under the bench, as if \
they had become friends too.

The little snail wanted to see the sea. "It is too far," said the beetle. "It is too deep," said the mouse. "It is \
too late," said the moth. But the snail went on, one leaf at a time. In the spring she reached the dunes. In the \
summer she heard the waves. And when she saw the water at last, wide and bright under the morning sun, she said \
only one thing: "Oh! It was here all the time."
"""
