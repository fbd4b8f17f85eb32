/*
 * pulse: a bare-metal guest that fills memory with known content, keeps a hot set dirty, and proves on demand what its
 * memory holds. README.md describes the command line and the serial protocol. Everything here runs in ring 3.
 *
 * The first CPU owns the serial port, the counting device and the schedule. It hands out jobs (fill, dirty) by
 * bumping `job_number`; every CPU, itself included, does its share of the pages and reports in `done`. Between two jobs
 * the others only spin, so a digest sees memory that nobody writes.
 */
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define HIGH_BASE 0x100000000UL
#define MAX_CPUS 8

#define COM1 0x3f8
#define COM1_LSR (COM1 + 5)
#define LSR_DATA_READY 0x01
#define LSR_THR_EMPTY 0x20

#define COUNT_OUT 0x2f0
#define COUNT_IN 0x2f4

#define LAPIC_ICR_LOW ((volatile u32 *)0xfee00300UL)
#define LAPIC_ICR_HIGH ((volatile u32 *)0xfee00310UL)
#define ICR_INIT 0x4500
#define ICR_STARTUP 0x4600
#define ICR_PENDING 0x1000
#define AP_PAGE 0x8000UL /* whatever the VMM left there, the command line too, is done with by then */

#define SPINS_PER_POLL 65536UL

enum mix { MIX_RAND, MIX_COMP, MIX_ZERO, MIX_DUP, MIX_REAL };
enum kind { UNTOUCHED, ZERO, RANDOM, HALF_TEXT, POINTERS, DUPLICATE };
enum job { JOB_FILL, JOB_DIRTY };

static struct {
	u64 base;		/* bytes */
	u64 low_pages, pages;	/* filled from `base` up; the same and those above 4 GiB */
	u64 hot_pages;
	u64 gap;		/* spins */
	u64 beat;		/* polls of a gap; 0 for none */
	u64 cpus;
	enum mix mix;
	u8 full, ticks, count;
} conf;

static volatile enum job job;
static volatile u64 job_number;
static volatile u64 done[MAX_CPUS][8];	/* a cache line each */
static volatile u8 wrong[MAX_CPUS];
static u64 pass, seed;
static u64 first_pass_of_seed;		/* pages hold a stamp of this seed only from the pass after it */

extern u8 ap_start[], ap_start_end[];
extern u64 tss_descriptors[MAX_CPUS][2];
extern volatile u32 ap_index;

/* gcc may call it for structure copies and fills. */
void *memset(void *to, int byte, u64 len)
{
	for (u8 *p = to; len; len--)
		*p++ = byte;
	return to;
}

static void out8(u32 port, u8 value)
{
	__asm__ volatile("outb %0, %w1" ::"a"(value), "d"(port));
}

static u8 in8(u32 port)
{
	u8 value;
	__asm__ volatile("inb %w1, %0" : "=a"(value) : "d"(port));
	return value;
}

static void spin(u64 times)
{
	while (times--)
		__asm__ volatile("");
}

/* ---- serial port ---- */

static void put(char c)
{
	/* Bounded: a VMM without a serial port must not stop the guest. */
	for (u32 tries = 0; tries < 10000 && !(in8(COM1_LSR) & LSR_THR_EMPTY); tries++)
		spin(1000);
	out8(COM1, c);
}

static void put_text(const char *s)
{
	while (*s)
		put(*s++);
}

static void put_hex(u64 v)
{
	for (int shift = 60; shift >= 0; shift -= 4)
		put("0123456789abcdef"[v >> shift & 15]);
}

static void put_decimal(u64 v)
{
	char digits[20];
	int n = 0;
	do
		digits[n++] = '0' + v % 10;
	while (v /= 10);
	while (n)
		put(digits[--n]);
}

/* 0 when nothing waits. A port that floats high (no device) has the data bit set: its 0xff is told apart. */
static u8 take_byte(void)
{
	u8 lsr = in8(COM1_LSR);
	return lsr != 0xff && lsr & LSR_DATA_READY ? in8(COM1) : 0;
}

/* ---- command line ---- */

/* The text after `key` where an option begins, else null. */
static const char *option(const char *line, const char *key)
{
	for (const char *at = line; *at; at++) {
		if (at != line && at[-1] != ' ')
			continue;
		const char *k = key, *p = at;
		while (*k && *k == *p)
			k++, p++;
		if (!*k)
			return p;
	}
	return 0;
}

static u64 number(const char *line, const char *key, u64 absent)
{
	const char *p = option(line, key);
	if (!p || *p < '0' || *p > '9')
		return absent;
	u64 n = 0;
	for (; *p >= '0' && *p <= '9'; p++)
		n = n * 10 + (*p - '0');
	return n;
}

static u64 at_most(u64 n, u64 limit)
{
	return n < limit ? n : limit;
}

static void configure(const char *line)
{
	u64 mib = 1 << 20, per_mib = mib / PAGE;
	const char *mix = option(line, "mix=");

	conf.base = number(line, "base=", 8) * mib;
	conf.low_pages = number(line, "fill=", 64) * per_mib;
	conf.pages = conf.low_pages + number(line, "high=", 0) * per_mib;
	conf.hot_pages = at_most(number(line, "hot=", 4) * per_mib, conf.pages);
	conf.gap = number(line, "gap=", 2000000);
	conf.beat = number(line, "beat=", 0);
	conf.cpus = at_most(number(line, "cpus=", 1), MAX_CPUS);
	if (!conf.cpus)
		conf.cpus = 1;
	conf.full = number(line, "full=", 0) != 0;
	conf.ticks = number(line, "ticks=", 1) != 0;
	conf.count = number(line, "count=", 0) != 0;
	switch (mix ? *mix : 'r') {
	case 'c': conf.mix = MIX_COMP; break;
	case 'z': conf.mix = MIX_ZERO; break;
	case 'd': conf.mix = MIX_DUP; break;
	default: conf.mix = mix && mix[0] == 'r' && mix[1] == 'e' ? MIX_REAL : MIX_RAND;
	}
}

/* ---- content ---- */

static u64 next_random(u64 *state)
{
	u64 x = *state;
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return *state = x;
}

static u64 scramble(u64 x)
{
	x = (x ^ x >> 31) * 0x7fb5d329728ea185UL;
	x = (x ^ x >> 27) * 0x81dadef4bc2dd44dUL;
	return x ^ x >> 33;
}

static u64 *page_at(u64 i)
{
	return (u64 *)(i < conf.low_pages ? conf.base + i * PAGE : HIGH_BASE + (i - conf.low_pages) * PAGE);
}

static enum kind kind_of(u64 i)
{
	/* Of 16 pages: what a used Linux guest's memory is like, in runs as it comes. */
	static const u8 real[16] = {
		RANDOM, HALF_TEXT, HALF_TEXT, HALF_TEXT, UNTOUCHED, UNTOUCHED, DUPLICATE, POINTERS,
		RANDOM, HALF_TEXT, HALF_TEXT, HALF_TEXT, UNTOUCHED, UNTOUCHED, DUPLICATE, POINTERS,
	};
	switch (conf.mix) {
	case MIX_COMP: return HALF_TEXT;
	case MIX_ZERO: return ZERO;
	case MIX_DUP: return DUPLICATE;
	case MIX_REAL: return real[i % 16];
	default: return RANDOM;
	}
}

static void fill_page(u64 i)
{
	u64 *p = page_at(i), k;
	enum kind kind = kind_of(i);
	u64 state = scramble((kind == DUPLICATE ? ~(i / 16 % 64) : i) + 0x5bd1e995) | 1;

	switch (kind) {
	case UNTOUCHED:
		break;
	case ZERO:
		for (k = 0; k < WORDS; k++)
			p[k] = 0;
		break;
	case RANDOM:
	case DUPLICATE:
		for (k = 0; k < WORDS; k++)
			p[k] = next_random(&state);
		break;
	case HALF_TEXT:
		for (k = 0; k < WORDS / 2; k++)
			p[k] = next_random(&state);
		for (; k < WORDS; k++)
			p[k] = 0x2e206f6d65646e49UL;
		break;
	case POINTERS:
		for (k = 0; k < WORDS; k++)
			p[k] = 0x00007f3c00000000UL | (next_random(&state) & 0xfffff8);
		break;
	}
}

/* The hot set is a window over all filled pages, at a place that depends on the seed, and wraps at their end. */
static u64 hot_page(u64 n)
{
	u64 start = seed ? scramble(seed) % conf.pages : 0;
	return (start + n) % conf.pages;
}

static u64 stamp(u64 i, u64 of_pass)
{
	return scramble(i << 40 ^ seed << 36 ^ of_pass) | 1;
}

static void dirty_page(u64 i, u8 *bad)
{
	volatile u64 *p = page_at(i);
	u64 old = stamp(i, pass - 1), new = stamp(i, pass), words = conf.full ? WORDS : 2;
	int check = pass > first_pass_of_seed;

	for (u64 k = 0; k < words; k++) {
		if (check && p[k] != old)
			*bad = 1;
		p[k] = new;
		next_random(&old);
		next_random(&new);
	}
}

static u64 digest(void)
{
	u64 a = 1, b = 2, c = 3, d = 4;
	for (u64 i = 0; i < conf.pages; i++) {
		const u64 *p = page_at(i);
		for (u64 k = 0; k < WORDS; k += 4) {	/* four lanes hide the latency of the multiplication */
			a = ((a ^ p[k]) * 0x9fb21c651e98df25UL), a ^= a >> 29;
			b = ((b ^ p[k + 1]) * 0xd6e8feb86659fd93UL), b ^= b >> 29;
			c = ((c ^ p[k + 2]) * 0xa0761d6478bd642fUL), c ^= c >> 29;
			d = ((d ^ p[k + 3]) * 0xe7037ed1a0b428dbUL), d ^= d >> 29;
		}
	}
	return scramble(a ^ scramble(b ^ scramble(c ^ scramble(d))));
}

/* ---- counting device ---- */

/* One exit each way. The device's answers and our numbers both go up by one; a lost or doubled exit breaks a sequence. */
static void count_exit(void)
{
	static u32 sequence, last;
	u32 answer;
	if (!conf.count)
		return;
	__asm__ volatile("outl %0, %w1" ::"a"(++sequence), "d"(COUNT_OUT));
	__asm__ volatile("inl %w1, %0" : "=a"(answer) : "d"(COUNT_IN));
	if (sequence > 1 && answer != last + 1)
		wrong[0] = 1;
	last = answer;
}

/* ---- jobs ---- */

static void do_share(u64 cpu)
{
	u64 pages = job == JOB_FILL ? conf.pages : conf.hot_pages;
	u64 end = pages * (cpu + 1) / conf.cpus;
	u8 bad = 0;

	for (u64 n = pages * cpu / conf.cpus; n < end; n++) {
		if (job == JOB_FILL) {
			fill_page(n);
			continue;
		}
		dirty_page(hot_page(n), &bad);
		if (cpu == 0 && n % 16 == 0)
			count_exit();
	}
	if (bad)
		wrong[cpu] = 1;
}

static void run_job(enum job which)
{
	job = which;
	__atomic_store_n(&job_number, job_number + 1, __ATOMIC_RELEASE);
	do_share(0);
	for (u64 cpu = 1; cpu < conf.cpus; cpu++)
		while (__atomic_load_n(&done[cpu][0], __ATOMIC_ACQUIRE) != job_number)
			__asm__ volatile("pause");
}

void ap_main(u64 cpu)
{
	u64 seen = 0;
	__atomic_store_n(&ap_index, 0, __ATOMIC_RELEASE);	/* tells the first CPU that we are here */
	for (;;) {
		u64 now = __atomic_load_n(&job_number, __ATOMIC_ACQUIRE);
		if (now == seen) {
			__asm__ volatile("pause");
			continue;
		}
		seen = now;
		if (cpu >= conf.cpus)	/* given up on, and came after all */
			continue;
		do_share(cpu);
		__atomic_store_n(&done[cpu][0], now, __ATOMIC_RELEASE);
	}
}

static void send_ipi(u64 cpu, u32 what)
{
	*LAPIC_ICR_HIGH = cpu << 24;
	*LAPIC_ICR_LOW = what;
	for (u32 tries = 0; tries < 1000 && *LAPIC_ICR_LOW & ICR_PENDING; tries++)
		spin(1000);
}

/* Starts CPUs 1 up; `conf.cpus` becomes the number that came. Local APIC ids are taken to be 0, 1, 2 … */
static void start_cpus(void)
{
	u8 *to = (u8 *)AP_PAGE;
	for (u8 *from = ap_start; from < ap_start_end; from++)
		*to++ = *from;
	for (u64 cpu = 1; cpu < conf.cpus; cpu++) {
		/* The first one's, not busy. */
		tss_descriptors[cpu][0] = tss_descriptors[0][0] & ~(2UL << 40);
		tss_descriptors[cpu][1] = tss_descriptors[0][1];
		__atomic_store_n(&ap_index, cpu, __ATOMIC_RELEASE);
		send_ipi(cpu, ICR_INIT);
		spin(10000000);		/* 10 ms by the book; KVM needs none of it */
		for (int sent = 0; sent < 2 && ap_index; sent++) {
			send_ipi(cpu, ICR_STARTUP | AP_PAGE >> 12);
			for (u64 wait = 0; wait < 200000 && ap_index; wait++)
				spin(1000);
		}
		if (ap_index) {
			put_text("X ");
			put_decimal(cpu);
			put('\n');
			conf.cpus = cpu;
		}
	}
}

/* ---- schedule ---- */

/* Obeys what came on the serial port; returns when nothing is left, and while standing still only after `g`. */
static void obey(void)
{
	int still = 0;
	do {
		u8 c = take_byte();
		if (c == 'd') {
			u64 sum = digest();
			put_text("D ");
			put_hex(sum);
			put_text("\ng ");
			put_decimal(pass);
			put('\n');
		} else if (c == 's') {
			still = 1;
			put_text("S\n");
		} else if (c == 'g') {
			still = 0;
			put_text("G\n");
		} else if (c >= '0' && c <= '9') {
			seed = c - '0';
			first_pass_of_seed = pass + 1;
			put_text("P ");
			put(c);
			put('\n');
		} else if (still) {
			spin(SPINS_PER_POLL);
		} else if (!c) {
			return;
		}
	} while (1);
}

void pulse_main(const char *command_line)
{
	static char line[2048];
	for (u64 i = 0; command_line && i < sizeof(line) - 1 && command_line[i]; i++)
		line[i] = command_line[i];
	configure(line);
	if (conf.cpus > 1)
		start_cpus();
	run_job(JOB_FILL);
	put_text("R\n");

	first_pass_of_seed = 1;
	for (pass = 1;; pass++) {
		u8 bad = 0;
		run_job(JOB_DIRTY);
		count_exit();
		for (u64 cpu = 0; cpu < conf.cpus; cpu++) {
			bad |= wrong[cpu];
			wrong[cpu] = 0;
		}
		if (bad)
			put('!');
		else if (conf.ticks)
			put('.');
		obey();
		u64 beats = 0;
		for (u64 spun = 0; spun < conf.gap; spun += SPINS_PER_POLL) {
			spin(at_most(SPINS_PER_POLL, conf.gap - spun));
			count_exit();
			obey();
			/* The last one of a gap is at its end: from there to the next tick is one pass. */
			if (conf.beat && (++beats == conf.beat || spun + SPINS_PER_POLL >= conf.gap)) {
				put(',');
				beats = 0;
			}
		}
	}
}
