/*
 * Entries of pulse, its page tables, descriptors and the start of the other CPUs.
 *
 *   linux64_entry  64-bit Linux boot protocol: long mode, %rsi = boot_params (the ELF entry point)
 *   pvh_entry      PVH: 32-bit protected mode without paging, %ebx = hvm_start_info (ELF note 18)
 *   ap_start       real mode after SIPI; pulse.c copies it to AP_PAGE
 *
 * All of them end in ring 3 in a few dozen instructions, because a KVM without hardware virtualization interprets
 * ring 0 one instruction at a time. The page tables are therefore part of the image rather than built by code.
 * Ports are opened by the I/O bitmap of a TSS: such a KVM does not honour IOPL 3.
 */

#define CODE0 0x08
#define CODE3 0x1b
#define DATA3 0x23
#define TSS0 0x28			/* one TSS descriptor of 16 bytes for each CPU */

#define PTE_USER_TABLE 0x007		/* present, writable, user */
#define PTE_USER_2M 0x087		/* the same, 2 MiB page */
#define PTE_USER_2M_UC 0x09f		/* the same, not cached */
#define LAPIC_2M (0xfee00000 >> 21)
#define MAPPED_GIB 16

	.section .note.pvh, "a", @note
	.balign 4
	.long 4, 8, 18			/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.quad pvh_entry

	.text
	.code32
pvh_entry:
	cli
	mov 24(%ebx), %edi		/* hvm_start_info.cmdline_paddr, below 4 GiB */
	mov $pml4, %eax
	mov %eax, %cr3
	mov %cr4, %eax
	or $0x20, %eax			/* PAE */
	mov %eax, %cr4
	mov $0xc0000080, %ecx		/* EFER */
	rdmsr
	or $0x100, %eax			/* LME */
	wrmsr
	lgdt gdtr
	mov %cr0, %eax
	or $0x80000001, %eax		/* PG, PE */
	mov %eax, %cr0
	ljmp $CODE0, $bsp_long_mode

	.code64
	.globl linux64_entry
linux64_entry:
	cli
	mov 0x228(%rsi), %edi		/* boot_params.hdr.cmd_line_ptr */
	mov $pml4, %eax
	mov %rax, %cr3
	lgdt gdtr
bsp_long_mode:				/* %edi = command line */
	mov %edi, %edi
	/* A link-time address cannot be split into the fields of a descriptor. */
	mov $tss, %eax
	mov %ax, tss_descriptors + 2
	shr $16, %eax
	mov %al, tss_descriptors + 4
	mov %ah, tss_descriptors + 7
	mov $TSS0, %eax
	mov $bsp_stack_top, %edx
	mov $bsp_user, %ecx
enter_ring3:				/* %eax = TSS selector, %edx = stack, %ecx = entry, %edi = its argument */
	ltr %ax
	mov $DATA3, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %edx, %esp
	push $DATA3
	push %rdx
	push $0x2			/* flags: interrupts off, and they stay off */
	push $CODE3
	push %rcx
	iretq

bsp_user:
	call pulse_main			/* does not return */
ap_user:
	call ap_main			/* does not return */

	.code16
	.globl ap_start, ap_start_end
ap_start:
	cli
	mov $pml4, %eax
	mov %eax, %cr3
	mov $0x20, %eax
	mov %eax, %cr4
	mov $0xc0000080, %ecx
	rdmsr
	or $0x100, %eax
	wrmsr
	lgdtl %cs:(ap_gdtr - ap_start)
	mov $0x80000001, %eax		/* without CD and NW, which a CPU has set after INIT */
	mov %eax, %cr0
	ljmpl $CODE0, $ap_long_mode
ap_gdtr:
	.word gdt_end - gdt - 1
	.long gdt
ap_start_end:

	.code64
ap_long_mode:
	mov ap_index, %edi		/* set by the first CPU, which starts one at a time */
	mov %edi, %eax
	shl $4, %eax
	add $TSS0, %eax
	mov %edi, %edx
	shl $12, %edx
	add $ap_stacks, %edx
	mov $ap_user, %ecx
	jmp enter_ring3

	.data
	.balign 4096
pml4:	.quad pdpt + PTE_USER_TABLE
	.fill 511, 8, 0
pdpt:
	.set gib, 0
	.rept MAPPED_GIB
	.quad pd + gib * 4096 + PTE_USER_TABLE
	.set gib, gib + 1
	.endr
	.fill 512 - MAPPED_GIB, 8, 0
pd:
	.set page, 0
	.rept MAPPED_GIB * 512
	.if page == LAPIC_2M
	.quad (page << 21) | PTE_USER_2M_UC
	.else
	.quad (page << 21) | PTE_USER_2M
	.endif
	.set page, page + 1
	.endr

	.balign 16
gdt:	.quad 0
	.quad 0x00af9b000000ffff	/* CODE0 */
	.quad 0x00cf93000000ffff	/* ring-0 data: only there to put CODE3 at its place */
	.quad 0x00affb000000ffff	/* CODE3 */
	.quad 0x00cff3000000ffff	/* DATA3 */
	.globl tss_descriptors
tss_descriptors:
	.quad 0x0000890000000000 | (tss_end - tss - 1)
	.quad 0
	.fill 7 * 2, 8, 0		/* the other CPUs', filled in by pulse.c */
gdt_end:
gdtr:	.word gdt_end - gdt - 1
	.quad gdt

	/* No interrupt or exception is ever taken, so all CPUs share one TSS and nothing but its bitmap is used. */
	.balign 128
tss:	.fill 102, 1, 0
	.word 104			/* the bitmap: ports 0 to 0x3ff open */
	.fill 128, 1, 0
	.byte 0xff
tss_end:

	.globl ap_index
	.balign 4
ap_index:
	.long 0

	.bss
	.balign 16
	.skip 16384
bsp_stack_top:
ap_stacks:				/* CPU n's stack ends at ap_stacks + n * 4096 */
	.skip 8 * 4096
	.section .note.GNU-stack, "", @progbits
