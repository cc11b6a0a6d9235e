"""The one kernel that decoding on the device needs beside the engine: the greedy next token, in PTX.

The driver translates it for the GPU that is there; so no compiler is needed, and nothing is built for one GPU.
"""

from __future__ import annotations

NEXT_TOKEN = "next_token"
THREADS = 1024  # of its one block; the table of values and places in shared memory is of this size

# next_token(logits f32[count], count u32, token (u32 or u64)[1], start (u32 or u64)[1], made u32[])
#
#   token[0] = argmax(logits), the first of equals, as numpy has it      the input of the next step
#   start[0] = start[0] + 1                                              its position
#   made[start[0]] = token[0]                                            what is read back in the end
#
# Of token and start in 8 bytes the upper halves are zero, and stay so.
#
#   thread t    the largest of logits[t], logits[t + 1024], ...     then pairs: t with t + 512, t + 256, ... t + 1
PTX = """
.version 6.0
.target sm_60
.address_size 64

.visible .entry next_token(
    .param .u64 at_logits, .param .u32 given_count, .param .u64 at_token, .param .u64 at_start, .param .u64 at_made)
{
    .reg .pred %p, %q, %r;
    .reg .u32 %thread, %count, %place, %index, %other_place, %stride, %peer, %start;
    .reg .f32 %best, %value;
    .reg .u64 %logits, %token, %from, %made, %address, %offset;
    .shared .align 4 .f32 values[1024];
    .shared .align 4 .u32 places[1024];

    ld.param.u64 %logits, [at_logits];
    ld.param.u32 %count, [given_count];
    cvta.to.global.u64 %logits, %logits;
    mov.u32 %thread, %tid.x;
    mov.f32 %best, 0fFF800000;
    mov.u32 %place, %thread;
    mov.u32 %index, %thread;

each:
    setp.ge.u32 %p, %index, %count;
    @%p bra all_seen;
    mul.wide.u32 %offset, %index, 4;
    add.u64 %address, %logits, %offset;
    ld.global.f32 %value, [%address];
    setp.gt.f32 %q, %value, %best;
    @%q mov.f32 %best, %value;
    @%q mov.u32 %place, %index;
    add.u32 %index, %index, 1024;
    bra each;

all_seen:
    mul.wide.u32 %offset, %thread, 4;
    mov.u64 %address, values;
    add.u64 %address, %address, %offset;
    st.shared.f32 [%address], %best;
    mov.u64 %address, places;
    add.u64 %address, %address, %offset;
    st.shared.u32 [%address], %place;
    mov.u32 %stride, 512;

halve:
    bar.sync 0;
    setp.ge.u32 %p, %thread, %stride;
    @%p bra joined;
    add.u32 %peer, %thread, %stride;
    mul.wide.u32 %offset, %peer, 4;
    mov.u64 %address, values;
    add.u64 %address, %address, %offset;
    ld.shared.f32 %value, [%address];
    mov.u64 %address, places;
    add.u64 %address, %address, %offset;
    ld.shared.u32 %other_place, [%address];
    setp.gt.f32 %p, %value, %best;
    setp.eq.f32 %q, %value, %best;
    setp.lt.and.u32 %r, %other_place, %place, %q;
    or.pred %p, %p, %r;
    @%p mov.f32 %best, %value;
    @%p mov.u32 %place, %other_place;
    mul.wide.u32 %offset, %thread, 4;
    mov.u64 %address, values;
    add.u64 %address, %address, %offset;
    st.shared.f32 [%address], %best;
    mov.u64 %address, places;
    add.u64 %address, %address, %offset;
    st.shared.u32 [%address], %place;

joined:
    shr.u32 %stride, %stride, 1;
    setp.ne.u32 %p, %stride, 0;
    @%p bra halve;

    setp.ne.u32 %p, %thread, 0;
    @%p bra done;
    ld.param.u64 %token, [at_token];
    ld.param.u64 %from, [at_start];
    ld.param.u64 %made, [at_made];
    cvta.to.global.u64 %token, %token;
    cvta.to.global.u64 %from, %from;
    cvta.to.global.u64 %made, %made;
    ld.global.u32 %start, [%from];
    add.u32 %start, %start, 1;
    st.global.u32 [%token], %place;
    st.global.u32 [%from], %start;
    mul.wide.u32 %offset, %start, 4;
    add.u64 %address, %made, %offset;
    st.global.u32 [%address], %place;

done:
    ret;
}
"""
